"""What a run will take, before anything big is loaded: memory by part, and time. No torch here.

Exact: the number of weights and adapters, their types, optimizer states, gradients, the KV cache, and what autograd
keeps of a Mistral layer (derived in `trlhf.estimate.activations`, compared with torch's own hooks in the tests).
Modelled: temporaries inside operations, what the C library keeps of freed memory on a CPU, and CUDA's context.
"""
