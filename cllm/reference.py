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


# GELU and the feed-forward part of a block -----------------------------------------------------------

_SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
_erf = np.vectorize(math.erf, otypes=[np.float64])


def gelu_forward(x, approximate="tanh"):
    """x Phi(x), Phi the normal distribution function (Hendrycks & Gimpel 2016).

    "none" uses erf, "tanh" their approximation 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).
    """
    (x,) = _float64(x)
    if approximate == "none":
        return 0.5 * x * (1 + _erf(x / math.sqrt(2)))
    return 0.5 * x * (1 + np.tanh(_SQRT_2_OVER_PI * (x + 0.044715 * x**3)))


def gelu_backward(dy, x, approximate="tanh"):
    """dy times the derivative of `gelu_forward` at x."""
    dy, x = _float64(dy, x)
    if approximate == "none":
        density = np.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)
        return dy * (0.5 * (1 + _erf(x / math.sqrt(2))) + x * density)
    tanh = np.tanh(_SQRT_2_OVER_PI * (x + 0.044715 * x**3))
    slope = _SQRT_2_OVER_PI * (1 + 3 * 0.044715 * x**2)
    return dy * (0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * slope)


def feed_forward_forward(x, w1, b1, w2, b2, approximate="tanh"):
    """y = linear(gelu(pre), w2, b2), pre = linear(x, w1, b1) -> y, pre."""
    pre = linear_forward(x, w1, b1)
    return linear_forward(gelu_forward(pre, approximate), w2, b2), pre


def feed_forward_backward(dy, x, pre, w1, w2, *, approximate="tanh", bias=True):
    """Gradients of `feed_forward_forward` -> dx, dw1, db1, dw2, db2 (biases None when bias is False)."""
    dhidden, dw2, db2 = linear_backward(dy, gelu_forward(pre, approximate), w2, bias=bias)
    dx, dw1, db1 = linear_backward(gelu_backward(dhidden, pre, approximate), x, w1, bias=bias)
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


# Layer norm ------------------------------------------------------------------------------------------


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


# Attention -------------------------------------------------------------------------------------------


def _log_sum_exp(z):
    """log(sum(exp(z))) over the last axis, without overflow."""
    largest = z.max(-1, keepdims=True)
    return np.log(np.exp(z - largest).sum(-1)) + largest[..., 0]


def _visible(i, n_keys, is_causal):
    """The number of keys that query i attends to: itself and those before it, or all."""
    return min(i + 1, n_keys) if is_causal else n_keys


def attention_forward(q, k, v, is_causal=False, scale=None, *, dropout_p=0.0, key=0):
    """out = dropout(softmax(scale q k^T)) v -> out, lse (Vaswani et al. 2017).

    q (B, H, T, D), k and v (B, H, S, D); out (B, H, T, D); lse (B, H, T) is the log of each row's sum of
    exponentials. scale is 1/sqrt(D) unless given. A causal row i uses the keys 0..i and nothing of the
    others, not even times zero: a NaN there cannot reach it. Dropout numbers the elements of
    (B, H, T, S) in C order.
    """
    q, k, v = _float64(q, k, v)
    T, S, D = q.shape[-2], k.shape[-2], q.shape[-1]
    scale = 1 / math.sqrt(D) if scale is None else scale
    dropped = dropout_scale((*q.shape[:-1], S), dropout_p, key)
    out = np.zeros((*q.shape[:-1], v.shape[-1]))
    lse = np.zeros(q.shape[:-1])
    for i in range(T):
        n = _visible(i, S, is_causal)
        scores = scale * np.einsum("...d,...sd->...s", q[..., i, :], k[..., :n, :])
        lse[..., i] = _log_sum_exp(scores)
        weights = np.exp(scores - lse[..., i, None]) * dropped[..., i, :n]
        out[..., i, :] = np.einsum("...s,...sd->...d", weights, v[..., :n, :])
    return out, lse


def attention_backward(dout, q, k, v, out, lse, is_causal=False, scale=None, *, dropout_p=0.0, key=0):
    """Gradients of `attention_forward` -> dq, dk, dv.

    With P the softmax and M the dropout scale, dP = M (dout v^T) and
    dS = P (dP - sum(dP P)), where the sum over the keys equals sum(dout out) over D.
    """
    dout, q, k, v, out, lse = _float64(dout, q, k, v, out, lse)
    T, S, D = q.shape[-2], k.shape[-2], q.shape[-1]
    scale = 1 / math.sqrt(D) if scale is None else scale
    dropped = dropout_scale((*q.shape[:-1], S), dropout_p, key)
    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    for i in range(T):
        n = _visible(i, S, is_causal)
        scores = scale * np.einsum("...d,...sd->...s", q[..., i, :], k[..., :n, :])
        p = np.exp(scores - lse[..., i, None])
        m = dropped[..., i, :n]
        dp = m * np.einsum("...d,...sd->...s", dout[..., i, :], v[..., :n, :])
        ds = p * (dp - (dout[..., i, :] * out[..., i, :]).sum(-1)[..., None])
        dq[..., i, :] = scale * np.einsum("...s,...sd->...d", ds, k[..., :n, :])
        dk[..., :n, :] += scale * ds[..., None] * q[..., i, None, :]
        dv[..., :n, :] += (p * m)[..., None] * dout[..., i, None, :]
    return dq, dk, dv


def _split_heads(x, n_head):
    """(B, T, C) -> (B, H, T, D)."""
    B, T, C = x.shape
    return np.moveaxis(x.reshape(B, T, n_head, C // n_head), 2, 1)


def _merge_heads(x):
    """(B, H, T, D) -> (B, T, C)."""
    B, H, T, D = x.shape
    return np.moveaxis(x, 1, 2).reshape(B, T, H * D)


def packed_attention_forward(qkv, n_head, *, is_causal=True, scale=None, dropout_p=0.0, key=0):
    """Attention on the packed projection qkv (B, T, 3C) = q | k | v -> out (B, T, C), lse (B, H, T)."""
    (qkv,) = _float64(qkv)
    q, k, v = (_split_heads(part, n_head) for part in np.split(qkv, 3, axis=-1))
    out, lse = attention_forward(q, k, v, is_causal, scale, dropout_p=dropout_p, key=key)
    return _merge_heads(out), lse


def packed_attention_backward(
    dout, qkv, out, lse, n_head, *, is_causal=True, scale=None, dropout_p=0.0, key=0
):
    """The gradient of `packed_attention_forward` -> dqkv (B, T, 3C)."""
    dout, qkv, out, lse = _float64(dout, qkv, out, lse)
    q, k, v = (_split_heads(part, n_head) for part in np.split(qkv, 3, axis=-1))
    dout, out = _split_heads(dout, n_head), _split_heads(out, n_head)
    gradients = attention_backward(dout, q, k, v, out, lse, is_causal, scale, dropout_p=dropout_p, key=key)
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


def cross_entropy_forward(logits, targets, *, ignore_index=-100, label_smoothing=0.0):
    """The loss of each row of logits (N, V) for targets (N,) -> losses, lse (N,).

    With smoothing s: loss = lse - (1 - s) logits[target] - s mean(logits); 0 in rows whose target
    is ignore_index. lse is the log of the row's sum of exponentials, in ignored rows too.
    """
    (logits,) = _float64(logits)
    targets = np.asarray(targets)
    lse = _log_sum_exp(logits)
    losses = np.zeros(len(logits))
    for i, target in enumerate(targets):
        if target != ignore_index:
            losses[i] = lse[i] - (1 - label_smoothing) * logits[i, target]
            if label_smoothing > 0:
                losses[i] -= label_smoothing * logits[i].mean()
    return losses, lse


def cross_entropy_backward(dlosses, logits, targets, lse, *, ignore_index=-100, label_smoothing=0.0):
    """dlogits = dloss (softmax(logits) - (1 - s) onehot(target) - s/V); 0 in ignored rows."""
    dlosses, logits, lse = _float64(dlosses, logits, lse)
    targets = np.asarray(targets)
    dlogits = np.zeros(logits.shape)
    for i, target in enumerate(targets):
        if target != ignore_index:
            dlogits[i] = np.exp(logits[i] - lse[i]) - label_smoothing / logits.shape[-1]
            dlogits[i, target] -= 1 - label_smoothing
            dlogits[i] *= dlosses[i]
    return dlogits


def linear_cross_entropy_forward(x, weight, targets, *, ignore_index=-100, label_smoothing=0.0):
    """Cross-entropy of the logits x weight^T.  x (N, C), weight (V, C) -> losses, lse (N,)."""
    return cross_entropy_forward(
        linear_forward(x, weight), targets, ignore_index=ignore_index, label_smoothing=label_smoothing
    )


def linear_cross_entropy_backward(
    dlosses, x, weight, targets, lse, *, ignore_index=-100, label_smoothing=0.0
):
    """Gradients of `linear_cross_entropy_forward` -> dx, dweight."""
    logits = linear_forward(x, weight)
    dlogits = cross_entropy_backward(
        dlosses, logits, targets, lse, ignore_index=ignore_index, label_smoothing=label_smoothing
    )
    return linear_backward(dlogits, x, weight, bias=False)[:2]


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


def sum_of_squares(x):
    """The sum of the squared elements, a float."""
    (x,) = _float64(x)
    return float((x**2).sum())


def scale_(x, factor):
    """x multiplied by factor, in place."""
    x *= factor
