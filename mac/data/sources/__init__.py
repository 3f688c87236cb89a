"""Public datasets: what is where (`catalogue`), how a file comes here (`http_download`), what came (`download`)."""
