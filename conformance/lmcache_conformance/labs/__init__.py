"""What the suites are built from: small specs and random KV, oracles, injected faults, test models, our own tiers."""
