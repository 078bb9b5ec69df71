//go:build race

package sim

// One goroutine has no races: a few seeds see that it is one. The others run
// without the detector.
const defaultSeeds = 40
