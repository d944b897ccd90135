InceptionV3 = None
