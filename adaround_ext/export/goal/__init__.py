"""Export goals: the runtime a model is quantized for, its rules, and refusals before any work."""
