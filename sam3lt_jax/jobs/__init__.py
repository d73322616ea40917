"""Batch inference over large sets of images: what to read, what to ask, what is done, what came out.

    files      local paths and URLs of object stores behind the same few functions
    sources    SOURCE -> items: a folder, a glob, a list, COCO images, tar shards, videos, or several of them
    questions  phrases and example boxes: the same for all images, or each image's own
    plan       the frozen split of the items into shards, opened again by a restart
    ledger     the shards' files; a shard in work: locked, appended to, recovered, committed
    run        a process's part of a job from its configuration to its summary; clips, the same for videos
    reading    decodes and resizes ahead of the devices
    pipeline   the stages around the engine, all at work at once
    results    the lines of a shard, and pictures of a sample
    summary    what a run tells at its end
    status     how far a job is, at what rate, what failed
    merge      the shards to one COCO file, Parquet, a list of failures

A job's folder:

    plan.json                      the fingerprint (model, profile, prompts, options), once; the split
    items.jsonl                    the items in the order of the shards (items-1.jsonl after a change)
    shards/shard-00012.jsonl       a committed shard: a line an image, failures included
    shards/shard-00012.json        its SHA-256, counts, time and host
    shards/shard-00012.jsonl.part  a shard in work, or left by a kill: a restart goes on from there
    shards/shard-00012.lock        who works on it

Only `run`, `clips` and `pipeline` import jax: `sam3lt status` and `sam3lt merge` start at once, on
any machine.
"""
