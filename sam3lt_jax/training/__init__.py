"""Training: what is common to distilling a text encoder and fine-tuning the detector, and both of them.

    optimizer    OptimizerConfig -> an optax transformation and its schedule
    state        TrainState: all that a step changes and a checkpoint holds
    step         make_train_step: loss function -> step(state, frozen, batch)
    freezing     split and merge parameters by name patterns
    checkpoints  TrainCheckpoints: asynchronous, exact resume, the best kept
    loop         fit: batches in, metrics.jsonl and checkpoints out
    curves       metrics.jsonl -> a picture
    disk         a full or unwritable disk: found out early, told in one sentence
    errors       what ends a run early

    distillation/  a LiteText text encoder learns a teacher's features
    detection/     the detector learns boxes, masks and scores

Devices, meshes and several hosts are in `sam3lt_jax.parallel`; annotation files
and batches in `sam3lt_jax.data`.
"""
