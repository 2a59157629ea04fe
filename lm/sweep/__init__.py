"""Runs many settings of one config: `lm sweep`.

`space` defines what is tried. `study` stores plan and results (Optuna). `trials` are processes. `launch` spreads them
over devices and machines. `vmapped` trains several runs as one program. A new launcher goes to launch.
"""
