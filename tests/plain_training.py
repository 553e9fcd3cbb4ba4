"""Plain training loops, written with PyTorch's autograd and AdamW alone: what a client's training is compared with."""
import torch


def beside(model, deltas):
    """Adds x ΔWᵀ to what layers give; deltas: dense (out, in) by layer name, made anew at each call, differentiable."""
    for name, delta in deltas.items():
        model.get_submodule(name).register_forward_hook(lambda module, args, y, delta=delta: y + args[0] @ delta().T)
    return model


def train(model, parameters, client, config, added=None, after=None):
    """Trains leaf tensors on the client's rows in their order, with transformers' loss and schedule; gives the losses.

    added(): a term of what is differentiated that the losses leave out; after(): called before the optimiser's step with the
    gradients unclipped, it gives what to do after the step.
    """
    from transformers import get_scheduler

    parameters = list(parameters)
    for p in parameters:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, client.learning_rate or config.learning_rate, weight_decay=config.weight_decay)
    kind = "constant_with_warmup" if config.lr_scheduler_type == "constant" else config.lr_scheduler_type
    steps = client.max_steps or config.max_steps
    schedule = get_scheduler(kind, optimizer, config.warmup_steps, steps)
    size, losses = config.per_device_train_batch_size, []
    epoch = [client.rows[i:i + size] for i in range(0, len(client.rows), size)]
    model.train()
    for step in range(steps):
        loss = loss_of(model, epoch[step % len(epoch)])
        (loss if added is None else loss + added()).backward()
        then = None if after is None else after(step)
        if config.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if then is not None:
            then()
    return losses


def loss_of(model, rows):
    """The mean loss over the labelled tokens of some rows, padded."""
    width = max(len(row["input_ids"]) for row in rows)
    pad = [width - len(row["input_ids"]) for row in rows]
    ids = torch.tensor([row["input_ids"] + [0] * p for row, p in zip(rows, pad, strict=True)])
    labels = torch.tensor([row["labels"] + [-100] * p for row, p in zip(rows, pad, strict=True)])
    mask = torch.tensor([[1] * (width - p) + [0] * p for p in pad])
    return model(input_ids=ids, attention_mask=mask, labels=labels).loss


def off(got, exact, start):
    """‖got - exact‖ / ‖exact - start‖: how far a trained tensor is from where it should be, in units of what it moved."""
    got, exact, start = got.detach().double(), exact.detach().double(), start.detach().double()
    return float((got - exact).norm() / (exact - start).norm())
