"""``kvq calibrate``: scales of K and V from real activations, written as a checkpoint.

``run`` drives, ``engine`` and ``hf`` run the model, ``observers`` keep statistics, ``scales``
decides, ``output`` writes.
"""
