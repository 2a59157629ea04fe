"""Talk to a trained model: `lm chat`.

A server and its scheduler go here.
"""
