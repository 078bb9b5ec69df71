// Package robust aggregates vectors so that a few bad ones do no harm: the
// coordinate-wise median and the coordinate-wise trimmed mean.
//
// The sources are the peers' vectors, all of one length; f is how many of n
// peers may be Byzantine, and n must exceed 2f. Call
//
//	err := robust.Median(dst, sources)
//	err := robust.TrimmedMean(dst, sources, f)
//
// The rules and their statistical rates are those of Yin, Chen, Ramchandran
// and Bartlett, "Byzantine-Robust Distributed Learning: Towards Optimal
// Statistical Rates", ICML 2018; the conventions are ByzFL's: the median of an
// even number is the mean of the middle two, and the trimmed mean leaves out f
// values at each end. TrimmedMean with f = 0 is a mean, but of sorted values:
// its last bits differ from those of a mean in the order of the peers.
//
// Both work on each coordinate by itself. To work through a vector in chunks,
// or on several threads, pass the elements lo to hi of dst and of each source:
//
//	parts[i] = sources[i][lo:hi]
//	err := robust.Median(dst[lo:hi], parts)
//
// The result is the same bits on every machine, for every order of the sources
// and however the vector is cut: -0 counts as +0, sums go from the smallest to
// the largest value, and each operation is rounded by itself. dst may be one
// of the sources. Beyond 1024 sources both allocate.
//
// Limits: the values must be finite; whoever takes vectors from others checks
// that first. With NaN the result is any value. Both protect a coordinate, not
// a vector: in high dimensions f peers can move the result by an error that
// grows with the square root of the dimension.
package robust

import (
	"errors"
	"fmt"

	"github.com/spirt-ml/spirt/internal/kernel"
)

// Median sets dst to the median of the sources in each coordinate. Up to
// (n-1)/2 of n sources can be anything, and it lies between values of the
// others.
func Median(dst []float32, sources [][]float32) error {
	if len(sources) == 0 {
		return errors.New("the median of no vectors: give one at least")
	}
	if err := fits(dst, sources); err != nil {
		return err
	}
	kernel.Median(dst, sources)
	return nil
}

// TrimmedMean sets dst to the mean of the sources without the f smallest and
// the f largest values of each coordinate. Up to f sources can be anything, and
// it lies between values of the others, but for rounding.
func TrimmedMean(dst []float32, sources [][]float32, f int) error {
	if f < 0 {
		return fmt.Errorf("the trimmed mean without %d vectors at each end: give 0 or more", f)
	}
	if f >= (len(sources)+1)/2 {
		return fmt.Errorf("the trimmed mean of %d vectors without %d at each end: give more than 2f vectors", len(sources), f)
	}
	if err := fits(dst, sources); err != nil {
		return err
	}
	kernel.TrimmedMean(dst, sources, f)
	return nil
}

func fits(dst []float32, sources [][]float32) error {
	for i, s := range sources {
		if len(s) != len(dst) {
			return fmt.Errorf("vector %d has %d elements, the destination %d: give vectors of one length", i, len(s), len(dst))
		}
	}
	return nil
}
