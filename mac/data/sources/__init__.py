"""Public datasets: what is where (`catalogue`), how a file comes here (`transfer`), what came (`fetch`)."""
