// Stands in for the threads of torch, which are OpenMP's: ThreadSanitizer cannot see how those wait
// for each other and would report races that are none.
#pragma once

// Into how many threads the next parallel_for divides its range, where it is long enough.
void set_threads(int count);

// The most threads that one parallel_for has had since the last set_threads.
int most_threads();
