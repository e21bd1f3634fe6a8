"""What the programs that take adapters accept: layer kinds, names, what they save by themselves, how they match names.

extract, convert and check all ask here, so that they cannot disagree. Nothing here reads or writes weights.
"""
