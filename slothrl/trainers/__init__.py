"""TRL's trainers with slothrl's engine, losses and log-probs inside; the only room that imports TRL."""
