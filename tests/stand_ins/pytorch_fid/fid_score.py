calculate_frechet_distance = None
