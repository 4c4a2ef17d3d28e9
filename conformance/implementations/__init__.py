"""Who answers, and where: the registry, programs, and groups of processes."""
