"""What `finetune` is made of: data and its order, what a run needs, the loop with its watchdog, checkpoints, and the report of a run.

Nothing is imported here, so that nothing heavy is imported with it.
"""
