"""`lemur convert parity`: do two models, or our code and the reference, compute the same; and if
not, what is the matter.

    weights.py     a model of any format, tensor by tensor, in HF's layout
    reference.py   the Llama layer in numpy, sharing no code with the model
    ours.py        the model's own functions, operation by operation
    compare.py     layer by layer on the same hidden states, with a reasoned budget
    logits.py      KL over the vocabulary by blocks
    diagnose.py    B's weights against A's: which mistake makes one of the other
    hypotheses.py  the mistakes that make one tensor of another, alone and two at once
    orders.py      the wrong orders of rows, by name
    places.py      tensors that belong in another layer, or have changed places
    vocabulary.py  rows of table and head that are off
    expanded.py    kv heads written several times over
    damage.py      flipped bits, overflow, zeros
    configs.py     what two configs say differently
    operations.py  which mistake of the code makes an operation diverge
    facts.py       NaN, zeros, constants, copies: what is wrong whatever the weights mean
    alone.py       one model without a twin: what the weights and a text show
    candidates.py  the mistakes that a text is tried against
    likelihood.py  how likely a text is under each of them, in one pass over the weights
    transformers_layer.py   transformers' own layer, when asked for
    unreadable.py  which tensors a file that cannot be read would have held
    finding.py     findings, and sentences made of them
    run.py         the whole, its plan and its report
"""

from lemur_jax.convert.parity.run import Report, parity

__all__ = ["Report", "parity"]
