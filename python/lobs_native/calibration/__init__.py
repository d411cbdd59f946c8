"""What layers read: passes over the data, and the statistics that they leave."""
