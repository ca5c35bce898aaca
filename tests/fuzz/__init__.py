"""Random cases at the two boundaries of the package, the native ops and the driver.

Every case ends in an exception of the right kind or in a right result: never in a crash, a hang or
silence. ``python -m tests.fuzz --help``; a case is plain JSON, so that it can be run again alone.

op_cases, tensor_changes     what is drawn for an op; op_arguments makes the arguments of it
op_contract, op_oracle       which arguments are valid, and what is then right; op_run asks both
driver_cases, driver_values  the same for optimize_layer and quantize_; driver_models has the layers
driver_state, driver_run     and models, driver_run judges, driver_state what must not change
child, harness               cases in a process that may die, and its watcher; planted tries them
"""
