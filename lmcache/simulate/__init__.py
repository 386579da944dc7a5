"""What a cache would have done: recorded or published request traces through the real control plane, without KV bytes."""
