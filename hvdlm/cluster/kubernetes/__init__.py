"""Jobs for Kubernetes: `hvdlm kubernetes`."""
