"""Random cases at the two boundaries of the package, the native ops and the driver.

Every case ends in an exception of the right kind or in a right result: never in a crash, a hang or
silence. ``python -m tests.fuzz --help``; a case is plain JSON, so that it can be run again alone.

op_cases, op_arguments, op_contract, op_oracle   the ops: what is drawn, the arguments that it
                                                 stands for, which of them are valid, what is right
driver_cases, driver_layers, driver_models       optimize_layer and quantize_
child, harness                                   cases in a process that may die, and its watcher
"""
