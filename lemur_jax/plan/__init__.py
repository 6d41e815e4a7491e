"""What a run needs and costs on a TPU slice that nobody holds: the TPU compiler's own answer.

`slices` names slices, `libtpu` prepares the process, `programs` compiles what training and sampling
run; `hlo`, `cost` and `memory` read the compiled programs, `report` prints. Every figure is
compiler-predicted, or a model's: nothing here has run on a TPU.
"""
