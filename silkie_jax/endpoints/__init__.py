"""Asking models behind an API, durably, within limits and a budget: whatever is sent and whatever comes back is kept.

A caller plans requests into a `store.RunStore` and hands `stage.run_stage` a function that judges the replies.
Requests go out live (`lanes`) or as batches (`batches`); a run killed at any moment is continued by the same call.
"""
