"""`dspark bench`: what decoding costs and gains, by domain, temperature, load and policy, within one run."""
