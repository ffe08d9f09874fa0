"""Shapes: how a row of other people's tools is understood, for training, evaluation and scoring alike.

`values` guards every number and text, `text` recognises structure written out as text, `messages` turns a value into
messages, `naming` knows the user's own names for columns and roles, `view` remembers what of a row was used.
"""
