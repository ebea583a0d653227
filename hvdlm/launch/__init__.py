"""Jobs on clusters of Ray and Spark that are up: `hvdlm launch`."""
