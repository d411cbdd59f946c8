"""Does it hold: run directories under kills, damage and hostile content, and the report's page."""
