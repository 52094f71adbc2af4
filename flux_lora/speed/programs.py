"""What `kernels` launches: Triton programs, each of which computes one row from device memory to device memory.

A row stays in registers, in parts of a power of two, so what is reduced over it is read once. Everything is computed in
float32 and rounded where it is stored. Triton's interpreter, by which the tests run these programs, truncates where a
device rounds: there the bits are rounded by hand.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

LARGEST = tl.constexpr(448.0)
"""Of E4M3."""
SMALLEST = tl.constexpr(2.0**-100)
"""What a row's largest value is taken for at least: its inverse is finite, and a row of zeros has a scale."""
GELU_1 = tl.constexpr(-2.302208198144325)
GELU_3 = tl.constexpr(-0.1029432396800835)
"""GELU (tanh) is x / (1 + 2^(x·(a + b·x²))) with a = −2·√(2/π)·log₂e and b = 0.044715·a."""


@triton.jit
def _whole(x):
    """Float32 rounded to the nearest whole multiple of the last bit of bfloat16, ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return tl.where((bits & 0x7FFFFFFF) >= 0x7F800000, bits, rounded).to(tl.float32, bitcast=True)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Float32 in another type, to the nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        x = _whole(x)
    return x.to(dtype)


@triton.jit
def eight_bits(x):
    """Float32 of at most 448 in E4M3, to the nearest, ties to even; what is no number stays none."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        rounded = (size + 0x7FFFF + ((size >> 20) & 1)) >> 20
        # Below 2^-6 all steps are 2^-9, which is the last bit of a float32 near 2^14.
        small = ((tl.abs(x) + 16384.0) - 16384.0) * 512.0
        code = tl.where(tl.abs(x) < 0.015625, small.to(tl.int32), rounded - 960)
        code = tl.where(size > 0x7F800000, 127, code) | ((bits >> 24) & 128)
        return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    return x.to(tl.float8e4nv)


@triton.jit
def _load(pointer, column, WIDTH: tl.constexpr, PART: tl.constexpr):
    if WIDTH % PART == 0:
        return tl.load(pointer + column).to(tl.float32)
    return tl.load(pointer + column, mask=column < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, column, value, WIDTH: tl.constexpr, PART: tl.constexpr):
    if WIDTH % PART == 0:
        tl.store(pointer + column, value)
    else:
        tl.store(pointer + column, value, mask=column < WIDTH)


@triton.jit
def _gelu(x):
    power = x * (GELU_1 + GELU_3 * x * x)
    if INTERPRETED:
        return x / (1.0 + tl.exp2(power))
    # Two instructions of the special function unit; Triton's own exp2 and division guard subnormals with six more.
    return x * tl.inline_asm_elementwise(
        "{ .reg .f32 t; ex2.approx.ftz.f32 t, $1; add.ftz.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t; }",
        "=r,r",
        [power],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _write(
    parts, values, start: tl.constexpr, factor, WIDTH: tl.constexpr, PART: tl.constexpr, QUANTIZED: tl.constexpr
):
    """Write a row's parts, eight bits after multiplication by ``factor``, from column ``start`` on."""
    for i in tl.static_range((WIDTH + PART - 1) // PART):
        column = i * PART + tl.arange(0, PART)
        if QUANTIZED:
            _store(values + start, column, eight_bits(parts[i] * factor), WIDTH, PART)
        else:
            _store(values + start, column, rounded(parts[i], values.dtype.element_ty), WIDTH, PART)


@triton.jit
def _factor(largest, scales, row):
    """Write the scale of a row by its largest value, and return what maps that to the largest number."""
    largest = tl.maximum(largest, SMALLEST)
    tl.store(scales + row, tl.math.div_rn(largest, LARGEST))
    return tl.math.div_rn(LARGEST, largest)


@triton.jit
def join(
    values,
    scales,
    attention,
    mlp,
    tokens,
    attention_batch,
    attention_token,
    attention_head,
    HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    MLP: tl.constexpr,
    MLP_PART: tl.constexpr,
    QUANTIZED: tl.constexpr,
):
    """A row of ``values`` is one of ``attention``, WIDTH long, and behind it the GELU of one of ``mlp``, MLP long."""
    row = tl.program_id(0).to(tl.int64)
    if WIDTH:
        source = attention + row // tokens * attention_batch + row % tokens * attention_token
    largest = 0.0
    first = ()
    peak = tl.zeros((PART,), tl.float32)
    for i in tl.static_range((WIDTH + PART - 1) // PART):
        column = i * PART + tl.arange(0, PART)
        place = column // HEAD * attention_head + column % HEAD
        if WIDTH % PART == 0:
            x = tl.load(source + place).to(tl.float32)
        else:
            x = tl.load(source + place, mask=column < WIDTH, other=0.0).to(tl.float32)
        first += (x,)
        peak = tl.maximum(peak, tl.abs(x))
    if QUANTIZED and WIDTH:
        largest = tl.max(peak, 0)
    second = ()
    peak = tl.zeros((MLP_PART,), tl.float32)
    for i in tl.static_range((MLP + MLP_PART - 1) // MLP_PART):
        x = _gelu(_load(mlp + row * MLP, i * MLP_PART + tl.arange(0, MLP_PART), MLP, MLP_PART))
        second += (x,)
        peak = tl.maximum(peak, tl.abs(x))
    if QUANTIZED and MLP:
        largest = tl.maximum(largest, tl.max(peak, 0))
    factor = 1.0
    if QUANTIZED:
        factor = _factor(largest, scales, row)
    values += row * (WIDTH + MLP)
    _write(first, values, 0, factor, WIDTH, PART, QUANTIZED)
    _write(second, values, WIDTH, factor, MLP, MLP_PART, QUANTIZED)


@triton.jit
def modulate(
    values,
    scales,
    sums,
    text,
    image,
    text_scale,
    image_scale,
    text_shift,
    image_shift,
    text_out,
    image_out,
    text_gate,
    image_gate,
    texts,
    images,
    text_batch,
    text_token,
    image_batch,
    image_token,
    vector_batch,
    eps,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    ADDED: tl.constexpr,
    QUANTIZED: tl.constexpr,
):
    """LayerNorm, times 1 + scale, plus shift, of text and image tokens behind one another.

    ADDED: of token + gate · out, which is also written to ``sums``.
    """
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // (texts + images), row % (texts + images)
    is_text = token < texts
    place = tl.where(is_text, token, token - texts)
    vector = batch * vector_batch
    token_stride, batch_stride = tl.where(is_text, text_token, image_token), tl.where(is_text, text_batch, image_batch)
    source = tl.where(is_text, text, image) + batch * batch_stride + place * token_stride
    scale = tl.where(is_text, text_scale, image_scale) + vector
    shift = tl.where(is_text, text_shift, image_shift) + vector
    if ADDED:
        gate = tl.where(is_text, text_gate, image_gate) + vector
        out = tl.where(is_text, text_out, image_out) + (batch * tl.where(is_text, texts, images) + place) * WIDTH
    parts = ()
    total = tl.zeros((PART,), tl.float32)
    for i in tl.static_range((WIDTH + PART - 1) // PART):
        column = i * PART + tl.arange(0, PART)
        x = _load(source, column, WIDTH, PART)
        if ADDED:
            x += _load(gate, column, WIDTH, PART) * _load(out, column, WIDTH, PART)
            x = rounded(x, sums.dtype.element_ty)
            _store(sums + row * WIDTH, column, x, WIDTH, PART)
            x = x.to(tl.float32)
        parts += (x,)
        total += x
    mean = tl.sum(total, 0) / WIDTH
    squares = tl.zeros((PART,), tl.float32)
    for i in tl.static_range((WIDTH + PART - 1) // PART):
        centered = parts[i] - mean
        if WIDTH % PART != 0:
            centered = tl.where(i * PART + tl.arange(0, PART) < WIDTH, centered, 0.0)
        squares += centered * centered
    inverse = tl.rsqrt(tl.sum(squares, 0) / WIDTH + eps)
    peak = tl.zeros((PART,), tl.float32)
    modulated = ()
    for i in tl.static_range((WIDTH + PART - 1) // PART):
        column = i * PART + tl.arange(0, PART)
        x = (parts[i] - mean) * inverse
        x = x * (1.0 + _load(scale, column, WIDTH, PART)) + _load(shift, column, WIDTH, PART)
        if WIDTH % PART != 0:
            x = tl.where(column < WIDTH, x, 0.0)
        peak = tl.maximum(peak, tl.abs(x))
        modulated += (x,)
    factor = 1.0
    if QUANTIZED:
        factor = _factor(tl.max(peak, 0), scales, row)
    _write(modulated, values + row * WIDTH, 0, factor, WIDTH, PART, QUANTIZED)


@triton.jit
def rotate(
    joint,
    text_query,
    text_key,
    text_value,
    query,
    key,
    value,
    text_query_norm,
    text_key_norm,
    query_norm,
    key_norm,
    cosine,
    sine,
    texts,
    images,
    text_batch,
    text_token,
    image_batch,
    image_token,
    joint_token,
    joint_kind,
    eps,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    VALUE: tl.constexpr,
):
    """HEADS heads of a token: its query and key go to ``joint``, normalized and rotated; VALUE: its value too."""
    row = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    batch, token = row // (texts + images), row % (texts + images)
    is_text = token < texts
    place = tl.where(is_text, token, token - texts)
    token_stride, batch_stride = tl.where(is_text, text_token, image_token), tl.where(is_text, text_batch, image_batch)
    start = batch * batch_stride + place * token_stride
    lane = tl.arange(0, HEAD)
    within = heads[:, None] * HEAD + lane[None, :]
    source, target = start + within, row * joint_token + within
    cosines = tl.load(cosine + token * HEAD + lane).to(tl.float32)
    sines = tl.load(sine + token * HEAD + lane).to(tl.float32)
    x = tl.load(tl.where(is_text, text_query, query) + source).to(tl.float32)
    weight = tl.load(tl.where(is_text, text_query_norm, query_norm) + lane).to(tl.float32)
    x = _rotated(x, weight, cosines, sines, eps, HEADS, HEAD)
    tl.store(joint + target, rounded(x, joint.dtype.element_ty))
    x = tl.load(tl.where(is_text, text_key, key) + source).to(tl.float32)
    weight = tl.load(tl.where(is_text, text_key_norm, key_norm) + lane).to(tl.float32)
    x = _rotated(x, weight, cosines, sines, eps, HEADS, HEAD)
    tl.store(joint + joint_kind + target, rounded(x, joint.dtype.element_ty))
    if VALUE:
        x = tl.load(tl.where(is_text, text_value, value) + source)
        tl.store(joint + 2 * joint_kind + target, x)


@triton.jit
def _rotated(x, weight, cosines, sines, eps, HEADS: tl.constexpr, HEAD: tl.constexpr):
    x = x * tl.rsqrt(tl.sum(x * x, 1) / HEAD + eps)[:, None] * weight[None, :]
    even, odd = tl.split(tl.reshape(x, (HEADS, HEAD // 2, 2)))
    even_cosine, odd_cosine = tl.split(tl.reshape(cosines, (HEAD // 2, 2)))
    even_sine, odd_sine = tl.split(tl.reshape(sines, (HEAD // 2, 2)))
    first = even * even_cosine[None, :] - odd * even_sine[None, :]
    second = odd * odd_cosine[None, :] + even * odd_sine[None, :]
    return tl.reshape(tl.join(first, second), (HEADS, HEAD))
