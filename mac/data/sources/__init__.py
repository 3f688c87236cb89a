"""Public datasets: files by name (`catalogue`), downloads (`download`, `http_download`), their checks."""
