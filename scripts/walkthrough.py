# ---
# jupyter:
#   jupytext:
#     text_representation:
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # LoRA on a small CNN, from a 10x10 matrix to one digit
#
# Runs from top to bottom in about half a minute on the digits that scikit-learn bundles. With the environment
# variable `LORAIO_DATASET=mnist` it uses MNIST instead, and takes a minute longer.

# %%
import os

import torch

import loraio
from loraio.adapter.lowrank import effective_rank, truncated_svd

DATASET = os.environ.get("LORAIO_DATASET", "digits")
DIGIT = 1
generator = torch.Generator().manual_seed(1)

# %% [markdown]
# ## 1. A matrix with less in it than its size
#
# A 10x10 matrix W made as the product of a (10, 2) and a (2, 10) matrix has 100 entries but only rank 2.

# %%
W = torch.randn(10, 2, generator=generator) @ torch.randn(2, 10, generator=generator)
print(f"W has {W.numel()} entries and rank {effective_rank(W)}")

# %% [markdown]
# Its truncated singular value decomposition gives W = B @ A, with B (10, 2) and A (2, 10).

# %%
rank = effective_rank(W)
B, A = truncated_svd(W, rank)
print(f"B is {tuple(B.shape)}, A is {tuple(A.shape)}: {B.numel() + A.numel()} numbers instead of {W.numel()}")

# %% [markdown]
# The same y = W x + b comes from the 40 numbers as from the 100.

# %%
x, bias = torch.randn(10, generator=generator), torch.randn(10, generator=generator)
y = W @ x + bias
y_factored = B @ (A @ x) + bias
print("y from W:    ", [f"{value:.4f}" for value in y.tolist()])
print("y from B, A: ", [f"{value:.4f}" for value in y_factored.tolist()])
svd_error = float((y - y_factored).abs().max())
print(f"largest difference: {svd_error:.1e}")

# %% [markdown]
# LoRA turns this round: leave W as it is, and learn a *change* of W that has a low rank from the start.
#
# ## 2. A network that has been trained
#
# Three convolutions and one linear layer.

# %%
train_images = loraio.load_dataset(DATASET, "train")
test_images = loraio.load_dataset(DATASET, "test")
epochs = 12 if DATASET == "digits" else 1
model = loraio.pretrain("digit-cnn", loraio.PretrainConfig(epochs=epochs), train_images)
for name, parameter in model.named_parameters():
    print(f"{name:<14} {tuple(parameter.shape)!s:<18} {parameter.numel():7,}")
print(f"{'all':<33} {sum(parameter.numel() for parameter in model.parameters()):7,}")

# %% [markdown]
# How many images of each digit does it misread?

# %%
base_result = loraio.evaluate(model, test_images)
print(f"accuracy {base_result.accuracy:.2%}")
for digit, count in enumerate(base_result.wrong):
    print(f"misread images of digit {digit}: {count}")

# %% [markdown]
# ## 3. What an adapter adds
#
# For each convolution, its weight seen as a matrix of (out, in * k * k): an A of (r, in * k * k) and a B of (out, r).
# At rank 1 that is about one percent of what the convolutions hold.

# %%
for r in (1, 2, 4, 8):
    report = loraio.parameter_report(model, loraio.new_adapter(model, loraio.TrainConfig(rank=r)))
    print(
        f"rank {r}: {report['adapted']:,} convolution parameters, {report['added']:,} added, {report['percent']:.3f} %"
    )

# %% [markdown]
# ## 4. Training it
#
# The base is frozen. The optimizer is made after the factors exist and gets nothing else. A starts from random
# numbers, B from zero, so that the network starts out as its own base. Half of every batch is the digit that the
# adapter is for, the other half is drawn evenly from the others: without them it would learn to answer that digit
# always.

# %%
frozen_copy = {name: tensor.clone() for name, tensor in model.state_dict().items()}
config = loraio.TrainConfig(digit=DIGIT, steps=120 if DATASET == "digits" else None)
adapter = loraio.train(model, config, train_images, held_out=test_images)
for name, factor in adapter.factors.items():
    print(f"{name:<20} {tuple(factor.shape)!s:<10} norm {float(factor.norm()):.3f}")
base_untouched = all(frozen_copy[name].equal(tensor) for name, tensor in model.state_dict().items())
print(f"the base is untouched: {base_untouched}")

# %% [markdown]
# ## 5. The weights with the adapter on and off
#
# On: W + scale * (B @ A) in the weight's own shape. Off: W, the same bits as ever.

# %%
with loraio.attach(model, adapter) as live:
    on = model.conv1.weight.detach().clone()
    live.disable()
    off = model.conv1.weight.detach().clone()
target = adapter.targets["conv1.weight"]
lora = adapter.factors_of("conv1.weight")
by_hand = frozen_copy["conv1.weight"] + target.scale * (lora["lora_B"] @ lora["lora_A"]).view(target.shape)
weight_error = float((on - by_hand).abs().max())
off_is_base = bool(off.equal(frozen_copy["conv1.weight"]))
print(f"first filter, off: {[f'{value:.3f}' for value in off[0].flatten().tolist()]}")
print(f"first filter, on:  {[f'{value:.3f}' for value in on[0].flatten().tolist()]}")
print(f"on, against the formula by hand: largest difference {weight_error:.1e}; off is the base: {off_is_base}")

# %% [markdown]
# ## 6. Misread images with the adapter on and off

# %%
with loraio.attach(model, adapter) as live:
    on_result = loraio.evaluate(model, test_images)
    live.disable()
    off_result = loraio.evaluate(model, test_images)
print(f"{'digit':<10}{'off':>5}{'on':>5}")
for digit in range(test_images.classes):
    mark = "  <- the adapter's own" if digit == DIGIT else ""
    print(f"{digit:<10}{off_result.wrong[digit]:>5}{on_result.wrong[digit]:>5}{mark}")
print(f"{'accuracy':<10}{off_result.accuracy:>7.2%}{on_result.accuracy:>7.2%}")

# %% [markdown]
# ## 7. Folded in for good
#
# The merged network needs no adapter any more, and computes the same outputs to the bit.

# %%
merged = loraio.merge(model.state_dict(), adapter)
proof = loraio.verify(model.state_dict(), adapter, merged, inputs=test_images.images)
print(f"verified: {proof.ok}; worst weight {proof.weights.max_ulp:.2f} ulp from the exact sum, ", end="")
print(f"largest difference of an output {proof.outputs.max_abs}, same answers {proof.outputs.argmax_agreement:.0%}")
