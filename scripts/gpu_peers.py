#!/usr/bin/env python3
"""Times what rambac is compared with on a GPU: PyTorch's flash attention, a straightforward HSA in Triton, selection in
plain PyTorch, a compiled chunked scan, and the card's own copy and matrix rates.

    python3 scripts/gpu_peers.py [--lens 4096,16384] [--batch 8] [--json FILE] [--only attend,scan]

Every Triton kernel is compared with plain float32 first.  Times are medians in microseconds.
"""
import argparse
import json
import sys

import torch
import torch._functorch.config
import triton
import triton.language as tl
from triton.testing import do_bench

HEADS, DIM, CHUNK, TOPK = 16, 64, 64, 8
SSM_HEADS, SSM_DIM, STATE, BLOCK = 32, 64, 128, 64


@triton.jit
def hsa_forward(q, k, v, idx, w, o, L, C, scale, H: tl.constexpr, D: tl.constexpr, S: tl.constexpr, K: tl.constexpr):
    """One program a token: its H heads are the rows of every product (one kv head)."""
    t, n = tl.program_id(0), tl.program_id(1)
    h, d, s = tl.arange(0, H), tl.arange(0, D), tl.arange(0, S)
    row = (n * L + t).to(tl.int64)
    x = tl.load(q + row * H * D + h[:, None] * D + d[None, :])
    acc = tl.zeros([H, D], tl.float32)
    for i in range(K):
        weight = tl.load(w + row * K + i)
        if weight > 0:
            at = (n * C + tl.load(idx + row * K + i)).to(tl.int64) * S * D + s[:, None] * D + d[None, :]
            p = tl.dot(x, tl.trans(tl.load(k + at))) * scale
            p = tl.exp(p - tl.max(p, 1)[:, None])
            p = p / tl.sum(p, 1)[:, None] * weight
            acc += tl.dot(p.to(x.dtype), tl.load(v + at))
    tl.store(o + row * H * D + h[:, None] * D + d[None, :], acc.to(x.dtype))


@triton.jit
def hsa_backward(
    q, k, v, idx, w, do, dq, dk, dv, dw, L, C, scale,
    H: tl.constexpr, D: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """As the forward; gradients of keys and values are added atomically in float32."""
    t, n = tl.program_id(0), tl.program_id(1)
    h, d, s = tl.arange(0, H), tl.arange(0, D), tl.arange(0, S)
    row = (n * L + t).to(tl.int64)
    mine = row * H * D + h[:, None] * D + d[None, :]
    x, g = tl.load(q + mine), tl.load(do + mine)
    acc = tl.zeros([H, D], tl.float32)
    for i in range(K):
        weight = tl.load(w + row * K + i)
        if weight > 0:
            at = (n * C + tl.load(idx + row * K + i)).to(tl.int64) * S * D + s[:, None] * D + d[None, :]
            keys, values = tl.load(k + at), tl.load(v + at)
            p = tl.dot(x, tl.trans(keys)) * scale
            p = tl.exp(p - tl.max(p, 1)[:, None])
            p = p / tl.sum(p, 1)[:, None]
            dp = tl.dot(g, tl.trans(values))
            delta = tl.sum(p * dp, 1)
            tl.store(dw + row * K + i, tl.sum(delta, 0))
            ds = (p * (dp - delta[:, None]) * (weight * scale)).to(x.dtype)
            acc += tl.dot(ds, keys)
            tl.atomic_add(dk + at, tl.dot(tl.trans(ds), x), sem="relaxed")
            tl.atomic_add(dv + at, tl.dot(tl.trans((p * weight).to(x.dtype)), g), sem="relaxed")
        else:
            tl.store(dw + row * K + i, 0.0)
    tl.store(dq + mine, acc.to(x.dtype))


def selections(n, length, chunks, kind, device):
    """Indices [n, L, K] of visible chunks, newest first, and weights, 0 where fewer are visible.  `clustered`: 64
    neighbouring tokens share their choice; `uniform`: every token has its own."""
    g = torch.Generator(device=device).manual_seed(1)
    every = CHUNK if kind == "clustered" else 1
    rows = length // every
    visible = (torch.arange(rows, device=device) * every) // CHUNK
    u = torch.rand(n, rows, TOPK, generator=g, device=device)
    # One of each K-th part of what is visible: distinct, and cheap to draw at any length.
    part = visible[None, :, None] / TOPK
    k = torch.arange(TOPK, device=device)
    few = visible[None, :, None] <= TOPK
    idx = torch.where(few, k.expand_as(u), ((k + u) * part).floor().long().clamp(max=max(chunks - 1, 0)))
    idx = idx.minimum((visible[None, :, None] - 1).clamp(min=0))
    count = visible.clamp(max=TOPK)
    filled = k[None, None] < count[None, :, None]
    idx = torch.where(filled, idx, torch.full_like(idx, -1)).sort(-1, descending=True).values
    w = torch.where(idx >= 0, torch.full_like(u, 1.0 / TOPK), torch.zeros_like(u))
    idx = idx.clamp(min=0).int().repeat_interleave(every, 1).contiguous()
    return idx, w.repeat_interleave(every, 1).contiguous()


def hsa_dense(q, k, v, idx, w):
    """HSA by gathering, in the operands' precision: for small sizes."""
    n = q.shape[0]
    b = torch.arange(n, device=q.device)[:, None, None]
    p = torch.einsum("nlhd,nlksd->nlhks", q, k[b, idx.long()]) * DIM**-0.5
    return torch.einsum("nlhks,nlksd,nlk->nlhd", p.softmax(-1), v[b, idx.long()], w)


class Hsa:
    def __init__(self, n, length, kind, dtype=torch.bfloat16, device="cuda"):
        self.L, self.C, self.n = length, length // CHUNK, n
        g = torch.Generator(device=device).manual_seed(0)
        draw = lambda *s: torch.randn(*s, generator=g, device=device, dtype=torch.float32).to(dtype)
        self.q, self.do = draw(n, length, HEADS, DIM), draw(n, length, HEADS, DIM)
        self.k, self.v = draw(n, self.C, CHUNK, DIM), draw(n, self.C, CHUNK, DIM)
        self.idx, self.w = selections(n, length, self.C, kind, device)
        self.o, self.dq = torch.empty_like(self.q), torch.empty_like(self.q)
        self.dw = torch.empty_like(self.w)

    def forward(self):
        hsa_forward[(self.L, self.n)](
            self.q, self.k, self.v, self.idx, self.w, self.o, self.L, self.C, DIM**-0.5, HEADS, DIM, CHUNK, TOPK,
            num_warps=4,
        )  # fmt: skip

    def backward(self):
        self.dk = torch.zeros(self.k.shape, device=self.k.device)
        self.dv = torch.zeros_like(self.dk)
        hsa_backward[(self.L, self.n)](
            self.q, self.k, self.v, self.idx, self.w, self.do, self.dq, self.dk, self.dv, self.dw, self.L, self.C,
            DIM**-0.5, HEADS, DIM, CHUNK, TOPK, num_warps=4,
        )  # fmt: skip

    def check(self):
        self.forward()
        self.backward()
        leaves = [x.detach().float().requires_grad_() for x in (self.q, self.k, self.v, self.w)]
        o = hsa_dense(*leaves[:3], self.idx, leaves[3])
        o.backward(self.do.float())
        pairs = [(self.o, o)] + list(zip((self.dq, self.dk, self.dv, self.dw), (x.grad for x in leaves)))
        # The gradient at an unfilled slot is not defined.
        pairs[4] = (self.dw, leaves[3].grad * (self.w > 0))
        for name, (a, b) in zip(("o", "dq", "dk", "dv", "dw"), pairs):
            error = ((a.float() - b).norm() / b.norm()).item()
            if not error < 2e-2:
                sys.exit(f"Triton HSA: {name} is off by {error:.2g}")


def select(q, landmarks, rows=4096):
    """Scores, mask, top-k, order and stick-breaking weights, rows by rows so that it fits."""
    out = []
    chunks = torch.arange(landmarks.shape[1], device=q.device)
    for at in range(0, q.shape[1], rows):
        x = q[:, at : at + rows]
        s = (x @ landmarks.transpose(1, 2)).float() * q.shape[-1] ** -0.5
        t = torch.arange(at, at + x.shape[1], device=q.device)
        s = s.masked_fill(t[:, None] < (chunks + 1) * CHUNK, float("-inf"))
        top, i = s.topk(min(TOPK, landmarks.shape[1]), -1)
        i, order = i.sort(-1, descending=True)
        top = top.gather(-1, order)
        w = (top - torch.nn.functional.softplus(top).cumsum(-1)).exp().nan_to_num()
        out.append((i, w))
    return out


def scan(x, dt, a, b, c):
    """Mamba-2's chunked scan (state-space duality), one group.  x [N, L, M, P], dt [N, L, M], a [M], b and c [N, L, R]."""
    n, length, m, p = x.shape
    x, dt, b, c = (z.unflatten(1, (-1, BLOCK)) for z in (x, dt, b, c))
    da = (dt * a).cumsum(2)
    xdt = (x * dt[..., None].to(x.dtype))
    decay = (da[:, :, :, None] - da[:, :, None]).permute(0, 1, 4, 2, 3)
    causal = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=x.device).tril()
    decay = decay.masked_fill(~causal, float("-inf")).exp()
    cb = torch.einsum("nkqr,nksr->nkqs", c, b)
    y = torch.einsum("nkmqs,nksmp->nkqmp", (cb[:, :, None].float() * decay).to(x.dtype), xdt)
    last = (da[:, :, -1:] - da).exp().to(x.dtype)
    states = torch.einsum("nksr,nksm,nksmp->nkmpr", b, last, xdt).float()
    # Decay from every block's end to every later block's start.
    total = da[:, :, -1].transpose(1, 2).cumsum(-1)
    between = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
    before = torch.einsum("nmkj,njmpr->nkmpr", between, states)
    before = torch.cat([torch.zeros_like(before[:, :1]), before[:, :-1]], 1).to(x.dtype)
    y = y + torch.einsum("nkqr,nkmpr,nkqm->nkqmp", c, before, da.exp().to(x.dtype))
    return y.reshape(n, length, m, p)


def median(f):
    return do_bench(f, warmup=25, rep=150, return_mode="median") * 1e3


def attempt(results, name, f):
    """A case that needs more memory than the card has is told, not counted."""
    try:
        torch.cuda.reset_peak_memory_stats()
        results[name] = {"us": f(), "peak_mib": torch.cuda.max_memory_allocated() >> 20}
    except torch.cuda.OutOfMemoryError:
        results[name] = {"us": None, "why": "out of memory"}
    torch.cuda.empty_cache()
    r = results[name]
    print(f"{name:44} {r['why'] if r['us'] is None else format(r['us'], '12.1f')}  {r.get('peak_mib', '')}", flush=True)


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--lens", default="4096,16384,65536")
    a.add_argument("--batch", type=int, default=8)
    a.add_argument("--only", default="rates,attend,select,scan,flash")
    a.add_argument("--json")
    a = a.parse_args()
    only, dev, out = a.only.split(","), "cuda", {}
    # Gradients are taken many times of one forward.
    torch._functorch.config.donated_buffer = False
    bf = lambda *s: torch.randn(*s, device=dev, dtype=torch.bfloat16)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"{'':44} {'us':>12}  peak MiB")
    if "rates" in only:
        x = torch.empty(1 << 30, dtype=torch.uint8, device=dev).random_()
        y = torch.empty_like(x)
        us = median(lambda: y.copy_(x))
        print(f"{'copy, GB/s read and written':44} {2 * x.numel() / us / 1e3:12.1f}")
        del x, y
        m = bf(8192, 8192)
        us_mm = median(lambda: m @ m.T)
        print(f"{'bf16 product of 8192, TFLOP/s':44} {2 * 8192**3 / us_mm / 1e6:12.1f}")
        out["rates"] = {"copy_gb_s": 2 * (1 << 30) / us / 1e3, "bf16_tflop_s": 2 * 8192**3 / us_mm / 1e6}
        del m
    if "attend" in only:
        for kind in ("clustered", "uniform"):
            Hsa(2, 1024, kind).check()
    for length in map(int, a.lens.split(",")):
        n = a.batch
        if "attend" in only:
            for kind in ("clustered", "uniform"):
                try:
                    h = Hsa(n, length, kind)
                except torch.cuda.OutOfMemoryError:
                    continue
                attempt(out, f"attend fwd triton {kind} {length}", lambda: median(h.forward))
                attempt(out, f"attend bwd triton {kind} {length}", lambda: median(h.backward))
                del h
        if "flash" in only and length <= 65536:
            q, k, v = bf(n, HEADS, length, DIM), bf(n, 1, length, DIM), bf(n, 1, length, DIM)
            k, v = (z.expand(-1, HEADS, -1, -1) for z in (k, v))
            f = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            attempt(out, f"full attention fwd flash {length}", lambda: median(f))
            for z in (q, k, v):
                z.requires_grad_()
            try:
                y, g = f(), bf(n, HEADS, length, DIM)
                back = lambda: torch.autograd.grad(y, (q, k, v), g, retain_graph=True)
                attempt(out, f"full attention bwd flash {length}", lambda: median(back))
                del y, g
            except torch.cuda.OutOfMemoryError:
                pass
            del q, k, v
        if "select" in only:
            q, lm = bf(n, length, 1024), bf(n, length // CHUNK, 1024)
            attempt(out, f"select fwd torch {length}", lambda: median(lambda: select(q, lm)))
            del q, lm
        if "scan" in only and length <= 65536:
            x, b, c = bf(n, length, SSM_HEADS, SSM_DIM), bf(n, length, STATE) / 8, bf(n, length, STATE) / 8
            dt = torch.rand(n, length, SSM_HEADS, device=dev) * 0.1
            la = -torch.rand(SSM_HEADS, device=dev) * 8
            compiled = torch.compile(scan)
            attempt(out, f"scan fwd compiled {length}", lambda: median(lambda: compiled(x, dt, la, b, c)))
            for z in (x, b, c):
                z.requires_grad_()
            try:
                y = compiled(x, dt, la, b, c)
                g = torch.randn_like(y)
                back = lambda: torch.autograd.grad(y, (x, b, c), g, retain_graph=True)
                attempt(out, f"scan bwd compiled {length}", lambda: median(back))
                del y, g
            except torch.cuda.OutOfMemoryError:
                pass
            del x, dt, b, c
        torch.cuda.empty_cache()
    if a.json:
        with open(a.json, "w") as f:
            json.dump(out, f, indent=1)


if __name__ == "__main__":
    main()
