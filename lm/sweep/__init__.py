"""Many settings of one config: `lm sweep`.

`space` says what is tried, `study` remembers (Optuna), `trials` are processes, `launch` spreads them over devices and
machines, `vmapped` trains several as one program. A new launcher goes to launch.
"""
