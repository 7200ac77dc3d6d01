"""Looking after an index file: describe it, check it, copy it, make it smaller.

None of this needs a model; all of it works while others search.
"""
