"""Training: what is common to distilling a text encoder and fine-tuning the detector, and both of them.

    optimizer    OptimizerConfig -> an optax transformation and its schedule
    state        TrainState: all that a step changes and a checkpoint holds
    step         make_train_step: loss function -> step(state, frozen, batch)
    freezing     split and merge parameters by name patterns
    loop         fit: batches in, metrics.jsonl and checkpoints out
    checkpoints  TrainCheckpoints: asynchronous, exact resume, damage found, the best kept
    run_files    config.json and metrics.jsonl of a run
    outcome      what a finished run leaves: the model in two formats, its numbers, curves
    curves       metrics.jsonl -> a picture
    errors       what ends a run early

    prompts      phrases -> held-out split, batches of tokens

    distillation/  a LiteText text encoder learns a teacher's features
    detection/     the detector learns boxes, masks and scores

Devices, meshes and several hosts are in `sam3lt_jax.parallel`; annotation files and batches in
`sam3lt_jax.data`; full disks and signals in `sam3lt_jax.storage`.
"""
