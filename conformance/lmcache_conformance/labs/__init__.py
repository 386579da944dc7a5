"""Building blocks of the suites: small specs and random KV, oracles, injected faults, test models, bundled tiers."""
