"""What tests and campaigns share: databases, bridges, networks, and a hostile environment."""
