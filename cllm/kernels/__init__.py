"""The one door to the compiled kernels: checks, allocates, picks threads; NumPy arrays in and out.

Inputs are float32 or float64 arrays, not mixed; they may be strided or read-only (copied when needed).
``out=`` takes an array, or a tuple where there are several outputs: each must have the result's shape
and dtype, be C-contiguous and writable, and must not overlap an input unless a docstring allows it. Of a
subclass such as np.memmap the memory is written, and a plain array that shows it is returned.
Nothing is written before all arguments have passed their checks. Results are the same bits at any
thread count. Letters: B batch size, T sequence length, C channels, H heads, D head size, V vocabulary.
"""

# ruff: noqa: F401  (the public names)

from cllm._kernels import available as available_isas
from cllm._kernels import isa
from cllm._kernels.gemm import OPENMP as openmp
from cllm.kernels.attention import (
    alibi_slopes,
    attention_backward,
    attention_forward,
    packed_attention_backward,
    packed_attention_forward,
)
from cllm.kernels.batches import TOKENS, gather_windows
from cllm.kernels.elementwise import (
    ACTIVATIONS,
    dropout_backward,
    dropout_forward,
    gelu_backward,
    gelu_forward,
    relu_backward,
    relu_forward,
    relu_squared_backward,
    relu_squared_forward,
    sigmoid_backward,
    sigmoid_forward,
    silu_backward,
    silu_forward,
    swiglu_backward,
    swiglu_forward,
    tanh_backward,
    tanh_forward,
)
from cllm.kernels.embedding import embedding_backward, embedding_forward
from cllm.kernels.linear import (
    feed_forward_backward,
    feed_forward_forward,
    linear_backward,
    linear_forward,
    matmul,
)
from cllm.kernels.loss import (
    bce_with_logits_backward,
    bce_with_logits_forward,
    cross_entropy_backward,
    cross_entropy_both,
    cross_entropy_forward,
    huber_backward,
    huber_forward,
    l1_backward,
    l1_forward,
    linear_cross_entropy_backward,
    linear_cross_entropy_both,
    linear_cross_entropy_forward,
    mse_backward,
    mse_forward,
    smooth_l1_backward,
    smooth_l1_forward,
    soft_cross_entropy_backward,
    soft_cross_entropy_forward,
)
from cllm.kernels.norm import layer_norm_backward, layer_norm_forward, rms_norm_backward, rms_norm_forward
from cllm.kernels.optimizers import (
    adafactor_update,
    adagrad_update,
    adam_update,
    adamw_update,
    array_statistics,
    clip_,
    gap,
    lion_update,
    muon_update,
    rmsprop_update,
    scale_,
    sgd_update,
    span,
    sum_of_squares,
)
from cllm.kernels.rotary import rotary_backward, rotary_forward
from cllm.kernels.softmax import (
    log_softmax_backward,
    log_softmax_forward,
    softmax_backward,
    softmax_forward,
)
from cllm.kernels.threads import MAX_THREADS, get_num_threads, set_num_threads
