"""The specification of every kernel: the same functions in plain float64 NumPy.

Names and the order of arguments are those of `cllm.kernels`; `out` and `accumulate` are left out, and
results are fresh float64 arrays. The optimizers update their arrays in place, as the kernels do.
Nothing here is fast: each function says what its kernel must compute, and the tests compare the two.
The backward functions are themselves checked against finite differences.

Letters: B batch size, T sequence length, C channels, H heads, D head size, V vocabulary, N rows.
"""

import math

import numpy as np

_UINT32 = 0xFFFFFFFF


def _float64(*arrays):
    """The arrays as float64; None stays None."""
    return [None if array is None else np.asarray(array, np.float64) for array in arrays]


def _rows(array):
    """`array` (..., C) as (N, C)."""
    return array.reshape(math.prod(array.shape[:-1]), array.shape[-1])


# Matrix products -------------------------------------------------------------------------------------


def matmul(a, b):
    """a (..., M, K) @ b (..., K, N) -> (..., M, N); leading dimensions broadcast."""
    a, b = _float64(a, b)
    return np.matmul(a, b)


def linear_forward(x, weight, bias=None):
    """y = x weight^T + bias.  x (..., K), weight (N, K), bias (N,) or None -> (..., N)."""
    x, weight, bias = _float64(x, weight, bias)
    y = x @ weight.T
    return y if bias is None else y + bias


def linear_backward(dy, x, weight, *, bias=True):
    """Gradients of `linear_forward` -> dx, dweight, dbias (None when bias is False)."""
    dy, x, weight = _float64(dy, x, weight)
    dx = dy @ weight
    dweight = _rows(dy).T @ _rows(x)
    return dx, dweight, _rows(dy).sum(0) if bias else None


# Activations and the feed-forward part of a block ----------------------------------------------------

_SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
_erf = np.vectorize(math.erf, otypes=[np.float64])


def gelu_forward(x, approximate="none"):
    """x Phi(x), Phi the normal distribution function (Hendrycks & Gimpel 2016).

    "none" uses erf, "tanh" their approximation 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).
    """
    (x,) = _float64(x)
    if approximate == "none":
        return 0.5 * x * (1 + _erf(x / math.sqrt(2)))
    return 0.5 * x * (1 + np.tanh(_SQRT_2_OVER_PI * (x + 0.044715 * x**3)))


def gelu_backward(dy, x, approximate="none"):
    """dy times the derivative of `gelu_forward` at x."""
    dy, x = _float64(dy, x)
    if approximate == "none":
        density = np.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)
        return dy * (0.5 * (1 + _erf(x / math.sqrt(2))) + x * density)
    tanh = np.tanh(_SQRT_2_OVER_PI * (x + 0.044715 * x**3))
    slope = _SQRT_2_OVER_PI * (1 + 3 * 0.044715 * x**2)
    return dy * (0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * slope)


def relu_forward(x):
    """max(x, 0)."""
    (x,) = _float64(x)
    return np.maximum(x, 0)


def relu_backward(dy, x):
    """dy where x > 0, 0 where x <= 0 whatever dy is, NaN where x is NaN."""
    dy, x = _float64(dy, x)
    return np.where(x > 0, dy, np.where(x <= 0, 0, np.nan))


def relu_squared_forward(x):
    """max(x, 0)^2 (So et al. 2021)."""
    return relu_forward(x) ** 2


def relu_squared_backward(dy, x):
    """2 x dy where x > 0, as `relu_backward` elsewhere."""
    dy, x = _float64(dy, x)
    return relu_backward(2 * x * dy, x)


def sigmoid_forward(x):
    """1 / (1 + exp(-x)), by the exponential that does not overflow."""
    (x,) = _float64(x)
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


def sigmoid_backward(dy, y):
    """dy y (1 - y), y the output of `sigmoid_forward`."""
    dy, y = _float64(dy, y)
    return dy * y * (1 - y)


def tanh_forward(x):
    """tanh(x)."""
    (x,) = _float64(x)
    return np.tanh(x)


def tanh_backward(dy, y):
    """dy (1 - y^2), y the output of `tanh_forward`."""
    dy, y = _float64(dy, y)
    return dy * (1 - y) * (1 + y)


def silu_forward(x):
    """x sigmoid(x); its limit 0 at -inf."""
    (x,) = _float64(x)
    return np.where(x == -np.inf, 0, x) * sigmoid_forward(x)


def silu_backward(dy, x):
    """dy s (1 + x (1 - s)), s = sigmoid(x); the slope's limits 0 and 1 at -inf and inf."""
    dy, x = _float64(dy, x)
    x = np.clip(x, -1e4, 1e4)
    return dy * sigmoid_forward(x) * (1 + x * sigmoid_forward(-x))


def swiglu_forward(gate, up):
    """silu(gate) up (Shazeer 2020)."""
    (up,) = _float64(up)
    return silu_forward(gate) * up


def swiglu_backward(dy, gate, up):
    """Gradients of `swiglu_forward` -> dgate, dup."""
    dy, up = _float64(dy, up)
    return silu_backward(dy * up, gate), dy * silu_forward(gate)


def _activate(pre, activation):
    if activation == "swiglu":
        return swiglu_forward(*np.split(pre, 2, axis=-1))
    if activation.startswith("gelu"):
        return gelu_forward(pre, "tanh" if activation == "gelu_tanh" else "none")
    return globals()[f"{activation}_forward"](pre)


def _activation_gradient(dhidden, pre, activation):
    if activation == "swiglu":
        return np.concatenate(swiglu_backward(dhidden, *np.split(pre, 2, axis=-1)), axis=-1)
    if activation.startswith("gelu"):
        return gelu_backward(dhidden, pre, "tanh" if activation == "gelu_tanh" else "none")
    saved = _activate(pre, activation) if activation in ("tanh", "sigmoid") else pre
    return globals()[f"{activation}_backward"](dhidden, saved)


def feed_forward_forward(x, w1, b1, w2, b2, activation="gelu_tanh"):
    """y = linear(activation(pre), w2, b2), pre = linear(x, w1, b1) -> y, pre.

    For swiglu the first half of pre is the gate.
    """
    pre = linear_forward(x, w1, b1)
    return linear_forward(_activate(pre, activation), w2, b2), pre


def feed_forward_backward(dy, x, pre, w1, w2, *, activation="gelu_tanh", bias=True):
    """Gradients of `feed_forward_forward` -> dx, dw1, db1, dw2, db2 (biases None when bias is False)."""
    (pre,) = _float64(pre)
    dhidden, dw2, db2 = linear_backward(dy, _activate(pre, activation), w2, bias=bias)
    dx, dw1, db1 = linear_backward(_activation_gradient(dhidden, pre, activation), x, w1, bias=bias)
    return dx, dw1, db1, dw2, db2


# Dropout ---------------------------------------------------------------------------------------------


def _mix(h):
    """A bijection of 32-bit numbers that flips each output bit with probability one half (lowbias32)."""
    h = (h ^ (h >> 16)) * 0x7FEB352D & _UINT32
    h = (h ^ (h >> 15)) * 0x846CA68B & _UINT32
    return h ^ (h >> 16)


def dropout_scale(shape, p, key):
    """1/(1 - p) where an element is kept and 0 where it is dropped.

    Element i (in C order) is kept when hash(key, i) < (1 - p) 2^32. The hash depends on the 64-bit
    key and on i alone, so that backward draws the same mask again and threads need no shared state.
    """
    i = np.arange(math.prod(shape), dtype=np.uint64)
    low, high = i & _UINT32, i >> 32
    h = _mix(low ^ (key & _UINT32))
    h = _mix(h ^ ((key >> 32) + high * 0x9E3779B9 & _UINT32))
    kept = h < (1 - p) * 2.0**32
    return np.where(kept, 1 / (1 - p) if p < 1 else 0.0, 0.0).reshape(shape)


def dropout_forward(x, p, key):
    """x with each element dropped (made 0) with probability p, the others divided by 1 - p."""
    (x,) = _float64(x)
    return x * dropout_scale(x.shape, p, key)


def dropout_backward(dy, p, key):
    """The gradient of `dropout_forward` with the same p and key."""
    return dropout_forward(dy, p, key)


# Norms -----------------------------------------------------------------------------------------------


def layer_norm_forward(x, weight, bias, eps=1e-5):
    """y = (x - mean) rstd weight + bias over the last axis -> y, mean, rstd = 1/sqrt(variance + eps).

    x (..., C), weight (C,), bias (C,) or None; mean, rstd (...). The variance divides by C
    (Ba, Kiros & Hinton 2016).
    """
    x, weight, bias = _float64(x, weight, bias)
    mean = x.mean(-1)
    centred = x - mean[..., None]
    rstd = 1 / np.sqrt((centred**2).mean(-1) + eps)
    y = centred * rstd[..., None] * weight
    return y if bias is None else y + bias, mean, rstd


def layer_norm_backward(dy, x, weight, mean, rstd, *, bias=True):
    """Gradients of `layer_norm_forward` -> dx, dweight, dbias (None when bias is False)."""
    dy, x, weight, mean, rstd = _float64(dy, x, weight, mean, rstd)
    normed = (x - mean[..., None]) * rstd[..., None]
    dnormed = dy * weight
    dx = dnormed - dnormed.mean(-1, keepdims=True) - normed * (dnormed * normed).mean(-1, keepdims=True)
    dweight = _rows(dy * normed).sum(0)
    return dx * rstd[..., None], dweight, _rows(dy).sum(0) if bias else None


def rms_norm_forward(x, weight=None, eps=None):
    """y = x rstd weight over the last axis -> y, rstd = 1/sqrt(mean(x^2) + eps) (Zhang & Sennrich 2019).

    x (..., C), weight (C,) or None; rstd (...). eps None is the machine epsilon of x's dtype.
    """
    eps = np.finfo(np.asarray(x).dtype).eps if eps is None else eps
    x, weight = _float64(x, weight)
    rstd = 1 / np.sqrt((x**2).mean(-1) + eps)
    y = x * rstd[..., None]
    return y if weight is None else y * weight, rstd


def rms_norm_backward(dy, x, weight, rstd):
    """Gradients of `rms_norm_forward` -> dx, dweight (None when weight is None)."""
    dy, x, weight, rstd = _float64(dy, x, weight, rstd)
    normed = x * rstd[..., None]
    dnormed = dy if weight is None else dy * weight
    dx = (dnormed - normed * (dnormed * normed).mean(-1, keepdims=True)) * rstd[..., None]
    return dx, None if weight is None else _rows(dy * normed).sum(0)


# Softmax ---------------------------------------------------------------------------------------------


def softmax_forward(x):
    """exp(x) over its sum along the last axis."""
    (x,) = _float64(x)
    e = np.exp(x - x.max(-1, keepdims=True, initial=-np.inf))
    return e / e.sum(-1, keepdims=True)


def softmax_backward(dy, y):
    """The gradient of `softmax_forward`, whose output is y."""
    dy, y = _float64(dy, y)
    return y * (dy - (dy * y).sum(-1, keepdims=True))


def log_softmax_forward(x):
    """log(softmax(x)) along the last axis."""
    (x,) = _float64(x)
    z = x - x.max(-1, keepdims=True, initial=-np.inf)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def log_softmax_backward(dy, y):
    """The gradient of `log_softmax_forward`, whose output is y."""
    dy, y = _float64(dy, y)
    return dy - np.exp(y) * dy.sum(-1, keepdims=True)


# Rotary positions ------------------------------------------------------------------------------------


def rotary_forward(x, *, offset=0, base=10000.0):
    """The pairs (i, i + D/2) of x (B, H, T, D) turned by p base^(-2 i / D), p = offset + t (Su et al. 2021).

    offset is one integer or one for each of the B sequences.
    """
    (x,) = _float64(x)
    B, _, T, D = x.shape
    positions = np.broadcast_to(np.asarray(offset), (B,))[:, None, None] + np.arange(T)[:, None]
    angles = positions * base ** (-2 * np.arange(D // 2) / max(D, 1))
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    a, b = x[..., : D // 2], x[..., D // 2 :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def rotary_backward(dy, *, offset=0, base=10000.0):
    """The gradient of `rotary_forward`: a rotation's transpose turns back."""
    (dy,) = _float64(dy)
    first, second = np.split(dy, 2, axis=-1)
    turned = rotary_forward(np.concatenate([first, -second], axis=-1), offset=offset, base=base)
    first, second = np.split(turned, 2, axis=-1)
    return np.concatenate([first, -second], axis=-1)


# Attention -------------------------------------------------------------------------------------------


def _log_sum_exp(z):
    """log(sum(exp(z))) over the last axis, without overflow."""
    largest = z.max(-1, keepdims=True)
    return np.log(np.exp(z - largest).sum(-1)) + largest[..., 0]


def _attention_rows(q, k, is_causal, scale, mask, slopes, offsets):
    """For each query: its b, h and i, its key head g, the keys j that it sees, and its scores with these."""
    (B, H, T, D), (G, S) = q.shape, k.shape[1:3]
    scale = 1 / math.sqrt(max(D, 1)) if scale is None else scale
    mask = None if mask is None else np.broadcast_to(mask, (B, H, T, S))
    for b, h, i in np.ndindex(B, H, T):
        g = h // (H // G)
        position = i + (0 if offsets is None else int(offsets[b]))
        seen = np.ones(S, bool)
        if is_causal:
            seen &= np.arange(S) <= position
        if mask is not None:
            seen &= mask[b, h, i] if mask.dtype == bool else mask[b, h, i] != -np.inf
        (j,) = np.nonzero(seen)
        scores = scale * np.einsum("sd,d->s", k[b, g, j], q[b, h, i])
        if slopes is not None:
            scores -= slopes[h] * np.abs(min(position, S - 1) - j)
        if mask is not None and mask.dtype != bool:
            scores += mask[b, h, i, j]
        yield b, h, i, g, j, scores


def attention_forward(
    q, k, v, is_causal=False, scale=None, *, dropout_p=0.0, key=0, mask=None, slopes=None, offsets=None
):
    """out = dropout(softmax(scale q k^T + bias)) v -> out, lse (Vaswani et al. 2017).

    q (B, H, T, D), k (B, G, S, D), v (B, G, S, E); query head h uses key head h // (H / G). out (B, H, T, E);
    lse (B, H, T) is the log of each row's sum of exponentials. scale is 1/sqrt(D) unless given. Query i of
    sequence b stands at position offsets[b] + i (i without offsets), key j at j. is_causal: a query sees the
    keys up to its position. mask broadcasts to (B, H, T, S): a boolean one names the keys that a query sees;
    a float one is added to the scores, and -inf in it excludes like False. slopes (H,): slope times distance
    is subtracted, a query beyond the last key counting from there. A row uses nothing of a key that it does
    not see, not even times zero: a NaN there cannot reach it. A row that sees none has out 0 and lse -inf.
    Dropout numbers the elements of (B, H, T, S) in C order.
    """
    q, k, v = _float64(q, k, v)
    dropped = dropout_scale((*q.shape[:3], k.shape[2]), dropout_p, key)
    out = np.zeros((*q.shape[:3], v.shape[3]))
    lse = np.full(q.shape[:3], -np.inf)
    for b, h, i, g, j, scores in _attention_rows(q, k, is_causal, scale, mask, slopes, offsets):
        if len(j):
            lse[b, h, i] = _log_sum_exp(scores)
            weights = np.exp(scores - lse[b, h, i]) * dropped[b, h, i, j]
            out[b, h, i] = np.einsum("s,se->e", weights, v[b, g, j])
    return out, lse


def attention_backward(
    dout, q, k, v, out, lse, is_causal=False, scale=None, *, dropout_p=0.0, key=0, mask=None, slopes=None,
    offsets=None,
):  # fmt: skip
    """Gradients of `attention_forward` -> dq, dk, dv.

    With P the softmax and M the dropout scale, dP = M (dout v^T) and
    dS = P (dP - sum(dP P)), where the sum over the keys equals sum(dout out) over E.
    """
    dout, q, k, v, out, lse = _float64(dout, q, k, v, out, lse)
    scale = 1 / math.sqrt(max(q.shape[3], 1)) if scale is None else scale
    dropped = dropout_scale((*q.shape[:3], k.shape[2]), dropout_p, key)
    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    for b, h, i, g, j, scores in _attention_rows(q, k, is_causal, scale, mask, slopes, offsets):
        if len(j):
            p = np.exp(scores - lse[b, h, i])
            m = dropped[b, h, i, j]
            dp = m * np.einsum("e,se->s", dout[b, h, i], v[b, g, j])
            ds = p * (dp - np.sum(dout[b, h, i] * out[b, h, i]))
            dq[b, h, i] = scale * np.einsum("s,sd->d", ds, k[b, g, j])
            dk[b, g, j] += scale * ds[:, None] * q[b, h, i]
            dv[b, g, j] += (p * m)[:, None] * dout[b, h, i]
    return dq, dk, dv


def _split_packed(qkv, n_head, n_kv_head):
    """(B, T, (H + 2 G) D) -> q (B, H, T, D), k and v (B, G, T, D)."""
    B, T, C = qkv.shape
    n_kv_head = n_head if n_kv_head is None else n_kv_head
    n = n_head + 2 * n_kv_head
    return np.split(np.moveaxis(qkv.reshape(B, T, n, C // n), 2, 1), [n_head, n_head + n_kv_head], axis=1)


def _split_heads(x, n_head):
    """(B, T, C) -> (B, H, T, D)."""
    B, T, C = x.shape
    return np.moveaxis(x.reshape(B, T, n_head, C // n_head), 2, 1)


def _merge_heads(x):
    """(B, H, T, D) -> (B, T, C)."""
    B, H, T, D = x.shape
    return np.moveaxis(x, 1, 2).reshape(B, T, H * D)


def packed_attention_forward(
    qkv, n_head, *, n_kv_head=None, is_causal=True, scale=None, dropout_p=0.0, key=0, slopes=None
):
    """Attention on packed qkv (B, T, (H + 2 G) D) = q | k | v -> out (B, T, H D), lse (B, H, T)."""
    (qkv,) = _float64(qkv)
    q, k, v = _split_packed(qkv, n_head, n_kv_head)
    out, lse = attention_forward(q, k, v, is_causal, scale, dropout_p=dropout_p, key=key, slopes=slopes)
    return _merge_heads(out), lse


def packed_attention_backward(
    dout, qkv, out, lse, n_head, *, n_kv_head=None, is_causal=True, scale=None, dropout_p=0.0, key=0,
    slopes=None,
):  # fmt: skip
    """The gradient of `packed_attention_forward` -> dqkv, of qkv's shape."""
    dout, qkv, out, lse = _float64(dout, qkv, out, lse)
    q, k, v = _split_packed(qkv, n_head, n_kv_head)
    dout, out = _split_heads(dout, n_head), _split_heads(out, n_head)
    options = {"dropout_p": dropout_p, "key": key, "slopes": slopes}
    gradients = attention_backward(dout, q, k, v, out, lse, is_causal, scale, **options)
    return np.concatenate([_merge_heads(gradient) for gradient in gradients], axis=-1)


# Embedding -------------------------------------------------------------------------------------------


def embedding_forward(tokens, weight):
    """The rows of weight (V, C) that tokens (...) name -> (..., C)."""
    (weight,) = _float64(weight)
    return weight[np.asarray(tokens)]


def embedding_backward(dy, tokens, n_rows):
    """Each row of dy (..., C) added to the row of dweight (n_rows, C) that its token names."""
    (dy,) = _float64(dy)
    dweight = np.zeros((n_rows, dy.shape[-1]))
    np.add.at(dweight, np.asarray(tokens).ravel(), _rows(dy))
    return dweight


# Softmax cross-entropy -------------------------------------------------------------------------------


def _class_weights(weight, n_classes):
    return np.ones(n_classes) if weight is None else _float64(weight)[0]


def _share_times(share, x):
    """share x, and 0 where there is no share even if x is infinite."""
    return np.multiply(share, x, out=np.zeros(np.shape(x)), where=share != 0)


def cross_entropy_forward(
    logits, targets, *, weight=None, ignore_index=-100, label_smoothing=0.0, z_loss=0.0
):
    """The loss of each row of logits (N, V) for targets (N,) -> losses, lse (N,).

    With class weights (V,) and smoothing s: loss = weight[target] ((1 - s) (lse - logits[target])
    + z_loss lse^2) + s mean(weight (lse - logits)); 0 in rows whose target is ignore_index, and in those of
    a class of weight 0 when s leaves nothing else. lse is the log of the row's sum of exponentials, in
    ignored rows too.
    """
    (logits,) = _float64(logits)
    targets = np.asarray(targets)
    weight = _class_weights(weight, logits.shape[1])
    smooth = label_smoothing * weight / logits.shape[1]
    lse = _log_sum_exp(logits)
    losses = np.zeros(len(logits))
    for i, target in enumerate(targets):
        if target != ignore_index and (weight[target] > 0 or smooth.any()):
            hard = weight[target] * (1 - label_smoothing)
            losses[i] = _share_times(hard, lse[i] - logits[i, target])
            losses[i] += _share_times(smooth, lse[i] - logits[i]).sum()
            losses[i] += _share_times(weight[target] * z_loss, lse[i] ** 2)
    return losses, lse


def cross_entropy_backward(
    dlosses, logits, targets, lse, *, weight=None, ignore_index=-100, label_smoothing=0.0, z_loss=0.0
):
    """The gradient of `cross_entropy_forward`, term by term; 0 in rows without a loss."""
    dlosses, logits, lse = _float64(dlosses, logits, lse)
    targets = np.asarray(targets)
    weight = _class_weights(weight, logits.shape[1])
    smooth = label_smoothing * weight / logits.shape[1]
    dlogits = np.zeros(logits.shape)
    for i, target in enumerate(targets):
        if target != ignore_index and (weight[target] > 0 or smooth.any()):
            hard = weight[target] * (1 - label_smoothing)
            dlse = hard + smooth.sum() + 2 * weight[target] * z_loss * lse[i]
            dlogits[i] = dlse * np.exp(logits[i] - lse[i]) - smooth
            dlogits[i, target] -= hard
            dlogits[i] *= dlosses[i]
    return dlogits


def soft_cross_entropy_forward(
    logits, probabilities, *, weight=None, label_smoothing=0.0, z_loss=0.0, mask=None
):
    """The loss of each row of logits (N, V) for probabilities (N, V) -> losses, lse (N,).

    loss = sum(weight ((1 - s) probabilities + s / V) (lse - logits))
    + z_loss lse^2 sum(weight probabilities); 0 where mask (N,) is False. A class without a share adds 0
    also where its logit is minus infinity.
    """
    logits, probabilities = _float64(logits, probabilities)
    weight = _class_weights(weight, logits.shape[1])
    share = weight * ((1 - label_smoothing) * probabilities + label_smoothing / logits.shape[1])
    lse = _log_sum_exp(logits)
    losses = _share_times(share, lse[:, None] - logits).sum(1)
    losses += _share_times(z_loss * (weight * probabilities).sum(1), lse**2)
    return losses if mask is None else np.where(mask, losses, 0), lse


def soft_cross_entropy_backward(
    dlosses, logits, probabilities, lse, *, weight=None, label_smoothing=0.0, z_loss=0.0, mask=None
):
    """The gradient of `soft_cross_entropy_forward` with respect to the logits."""
    dlosses, logits, probabilities, lse = _float64(dlosses, logits, probabilities, lse)
    weight = _class_weights(weight, logits.shape[1])
    share = weight * ((1 - label_smoothing) * probabilities + label_smoothing / logits.shape[1])
    dlse = share.sum(1) + _share_times(2 * z_loss * (weight * probabilities).sum(1), lse)
    dlogits = dlosses[:, None] * (_share_times(dlse[:, None], np.exp(logits - lse[:, None])) - share)
    return dlogits if mask is None else np.where(np.asarray(mask)[:, None], dlogits, 0)


def linear_cross_entropy_forward(
    x, weight, targets, *, class_weight=None, ignore_index=-100, label_smoothing=0.0, z_loss=0.0
):
    """Cross-entropy of the logits x weight^T.  x (N, C), weight (V, C) -> losses, lse (N,)."""
    return cross_entropy_forward(
        linear_forward(x, weight), targets, weight=class_weight, ignore_index=ignore_index,
        label_smoothing=label_smoothing, z_loss=z_loss,
    )  # fmt: skip


def linear_cross_entropy_backward(
    dlosses, x, weight, targets, lse, *, class_weight=None, ignore_index=-100, label_smoothing=0.0, z_loss=0.0
):
    """Gradients of `linear_cross_entropy_forward` -> dx, dweight."""
    dlogits = cross_entropy_backward(
        dlosses, linear_forward(x, weight), targets, lse, weight=class_weight, ignore_index=ignore_index,
        label_smoothing=label_smoothing, z_loss=z_loss,
    )  # fmt: skip
    return linear_backward(dlogits, x, weight, bias=False)[:2]


# Elementwise losses ----------------------------------------------------------------------------------
# All arrays have one shape; the gradient is that of input.


def mse_forward(input, target):
    """(input - target)^2."""
    input, target = _float64(input, target)
    return (input - target) ** 2


def mse_backward(dlosses, input, target):
    dlosses, input, target = _float64(dlosses, input, target)
    return dlosses * 2 * (input - target)


def l1_forward(input, target):
    """|input - target|."""
    input, target = _float64(input, target)
    return np.abs(input - target)


def l1_backward(dlosses, input, target):
    dlosses, input, target = _float64(dlosses, input, target)
    return dlosses * np.sign(input - target)


def smooth_l1_forward(input, target, beta=1.0):
    """With d = |input - target|: d^2 / (2 beta) below beta, d - beta / 2 from there on (Girshick 2015)."""
    if beta == 0:
        return l1_forward(input, target)
    d = l1_forward(input, target)
    return np.where(d < beta, d * d / (2 * beta), d - beta / 2)


def smooth_l1_backward(dlosses, input, target, beta=1.0):
    if beta == 0:
        return l1_backward(dlosses, input, target)
    dlosses, input, target = _float64(dlosses, input, target)
    return dlosses * np.clip((input - target) / beta, -1, 1)


def huber_forward(input, target, delta=1.0):
    """With d = |input - target|: d^2 / 2 up to delta, delta (d - delta / 2) beyond (Huber 1964)."""
    d = l1_forward(input, target)
    return np.where(d <= delta, d * d / 2, delta * (d - delta / 2))


def huber_backward(dlosses, input, target, delta=1.0):
    dlosses, input, target = _float64(dlosses, input, target)
    return dlosses * np.clip(input - target, -delta, delta)


def bce_with_logits_forward(input, target, weight=None, pos_weight=None):
    """-weight (pos_weight target log(sigmoid(input)) + (1 - target) log(1 - sigmoid(input)))."""
    input, target = _float64(input, target)
    weight, pos_weight = (1 if array is None else _float64(array)[0] for array in (weight, pos_weight))
    return weight * (
        pos_weight * target * np.logaddexp(0, -input) + (1 - target) * np.logaddexp(0, input)
    )


def bce_with_logits_backward(dlosses, input, target, weight=None, pos_weight=None):
    dlosses, input, target = _float64(dlosses, input, target)
    weight, pos_weight = (1 if array is None else _float64(array)[0] for array in (weight, pos_weight))
    sigmoid, other = np.exp(-np.logaddexp(0, -input)), np.exp(-np.logaddexp(0, input))
    return dlosses * weight * ((1 - target) * sigmoid - pos_weight * target * other)


# Optimizers (in place) -------------------------------------------------------------------------------


def _decayed(grad, param, weight_decay, maximize):
    """The gradient to descend along, with the decay added."""
    return (-grad if maximize else grad) + weight_decay * param


def sgd_update(
    param, grad, momentum_buffer=None, *, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False,
    first=False, maximize=False,
):  # fmt: skip
    """Gradient descent with momentum, as torch.optim.SGD; the first step sets the buffer to the gradient."""
    g = _decayed(grad, param, weight_decay, maximize)
    if momentum != 0:
        momentum_buffer[...] = g if first else momentum * momentum_buffer + (1 - dampening) * g
        g = g + momentum * momentum_buffer if nesterov else momentum_buffer
    param -= lr * g


def adam_update(
    param, grad, m, v, *, step, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, v_max=None, maximize=False
):
    """Adam (Kingma & Ba 2015); step counts from 1; v_max gives AMSGrad (Reddi et al. 2018)."""
    g = _decayed(grad, param, weight_decay, maximize)
    m[...] = betas[0] * m + (1 - betas[0]) * g
    v[...] = betas[1] * v + (1 - betas[1]) * g**2
    second = v
    if v_max is not None:
        v_max[...] = np.maximum(v_max, v)
        second = v_max
    m_hat = m / (1 - betas[0] ** step)
    v_hat = second / (1 - betas[1] ** step)
    param -= lr * m_hat / (np.sqrt(v_hat) + eps)


def adamw_update(
    param, grad, m, v, *, step, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, v_max=None,
    maximize=False,
):  # fmt: skip
    """Adam with decoupled decay: param shrinks by lr * weight_decay (Loshchilov & Hutter 2019)."""
    param *= 1 - lr * weight_decay
    adam_update(param, grad, m, v, step=step, lr=lr, betas=betas, eps=eps, v_max=v_max, maximize=maximize)


def rmsprop_update(
    param, grad, v, *, lr, alpha=0.99, eps=1e-8, weight_decay=0.0, momentum=0.0, momentum_buffer=None,
    grad_avg=None, maximize=False,
):  # fmt: skip
    """RMSprop (Tieleman & Hinton 2012) as torch.optim.RMSprop; grad_avg gives the centred form."""
    g = _decayed(grad, param, weight_decay, maximize)
    v[...] = alpha * v + (1 - alpha) * g**2
    variance = v
    if grad_avg is not None:
        grad_avg[...] = alpha * grad_avg + (1 - alpha) * g
        variance = v - grad_avg**2
    change = g / (np.sqrt(variance) + eps)
    if momentum != 0:
        momentum_buffer[...] = momentum * momentum_buffer + change
        change = momentum_buffer
    param -= lr * change


def adagrad_update(
    param, grad, accumulator, *, step, lr, lr_decay=0.0, weight_decay=0.0, eps=1e-10, maximize=False
):
    """Adagrad (Duchi et al. 2011) as torch.optim.Adagrad; step counts from 1."""
    g = _decayed(grad, param, weight_decay, maximize)
    accumulator += g**2
    param -= lr / (1 + (step - 1) * lr_decay) * g / (np.sqrt(accumulator) + eps)


def lion_update(param, grad, m, *, lr, betas=(0.9, 0.99), weight_decay=0.0, maximize=False):
    """Lion (Chen et al. 2023): a step of lr along the sign of an interpolated momentum, decoupled decay."""
    g = -grad if maximize else grad
    param *= 1 - lr * weight_decay
    param -= lr * np.sign(betas[0] * m + (1 - betas[0]) * g)
    m[...] = betas[1] * m + (1 - betas[1]) * g


def _rms(x):
    """The root mean square."""
    return math.sqrt((x**2).mean())


def adafactor_update(
    param, grad, row_var=None, col_var=None, variance=None, *, step, lr, beta2_decay=-0.8, eps=(None, 1e-3),
    d=1.0, weight_decay=0.0, maximize=False,
):  # fmt: skip
    """Adafactor (Shazeer & Stern 2018) as torch.optim.Adafactor: a matrix factored, a vector not."""
    if param.size == 0:
        return
    eps1 = np.finfo(np.float64).eps if eps[0] is None else eps[0]
    rest = float(step) ** beta2_decay
    size = np.maximum(eps[1], _rms(param)) * min(lr, step**-0.5)
    param *= 1 - lr * weight_decay
    if param.ndim > 1:
        row_var[...] = (1 - rest) * row_var + rest * (grad**2).mean(-1, keepdims=True)
        col_var[...] = (1 - rest) * col_var + rest * (grad**2).mean(-2, keepdims=True)
        v = row_var * col_var / np.maximum(row_var.mean(-2, keepdims=True), eps1)
    else:
        variance[...] = (1 - rest) * variance + rest * grad**2
        v = variance
    u = (-grad if maximize else grad) / np.sqrt(np.maximum(v, eps1**2))
    param -= size / np.maximum(1, _rms(u) / d) * u


def muon_update(
    param, grad, momentum_buffer, *, lr, weight_decay=0.1, momentum=0.95, nesterov=True,
    ns_coefficients=(3.4445, -4.775, 2.0315), eps=1e-7, ns_steps=5, adjust_lr_fn=None,
):  # fmt: skip
    """Muon (Jordan et al. 2024) as torch.optim.Muon, with the Newton-Schulz products in full precision."""
    if param.size == 0:
        return
    a, b, c = ns_coefficients
    n_rows, n_columns = param.shape
    momentum_buffer[...] = momentum * momentum_buffer + (1 - momentum) * grad
    x = momentum * momentum_buffer + (1 - momentum) * grad if nesterov else momentum_buffer
    x = x.T if n_rows > n_columns else x
    x = x / np.maximum(np.linalg.norm(x), eps)
    for _ in range(ns_steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    if adjust_lr_fn == "match_rms_adamw":
        factor = 0.2 * math.sqrt(max(n_rows, n_columns))
    else:
        factor = math.sqrt(max(1, n_rows / n_columns))
    param *= 1 - lr * weight_decay
    param -= lr * factor * (x.T if n_rows > n_columns else x)


def sum_of_squares(x):
    """The sum of the squared elements, a float."""
    (x,) = _float64(x)
    return float((x**2).sum())


def scale_(x, factor):
    """x multiplied by factor, in place."""
    x *= factor


def clip_(x, limit):
    """x limited to [-limit, limit], in place."""
    np.clip(x, -limit, limit, out=x)


def array_statistics(arrays):
    """Sum of squares, largest magnitude, number of zeros and of non-finite elements of each array."""
    return np.array(
        [
            [(x**2).sum(), np.abs(x).max(initial=0), (x == 0).sum(), (~np.isfinite(x)).sum()]
            for x in _float64(*arrays)
        ]
    ).reshape(len(arrays), 4)
