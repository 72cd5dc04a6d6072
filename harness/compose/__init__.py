"""Pure arithmetic: tokens/step, step cost, their quotient."""
