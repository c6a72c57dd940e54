"""Work sent elsewhere: layers as Ray tasks (`ray_executor`), whole verbs as Ray jobs (`submit`)."""
