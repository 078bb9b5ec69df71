package tensordb

import (
	"fmt"
	"slices"

	"github.com/spirt-ml/spirt/internal/kernel"
	"github.com/spirt-ml/spirt/robust"
	"github.com/spirt-ml/spirt/tensor"
)

// maxWeight bounds a weight of a mean: float32 holds all whole numbers below.
const maxWeight = 1 << 24

// Mean stores the mean of tensors of one shape, all float32 or all float16,
// under dst as float32. They are added in the order of keys, each times its
// weight, and divided by the sum of the weights; without weights, or where all
// are equal, they are added as they are and divided by their number.
func (db *DB) Mean(dst string, keys []string, weights []uint32) error {
	w, err := checkWeights(keys, weights)
	if err != nil {
		return err
	}
	return db.combine("averaging", dst, keys, false, func(to []float32, from [][]float32) error {
		if w != nil {
			kernel.WeightedMean(to, from, w)
		} else {
			kernel.Mean(to, from)
		}
		return nil
	}, func(to []float32, from [][]uint16) { kernel.HalfMean(to, from, w) })
}

// Sum stores the sum of tensors of one shape, added in the order of keys,
// under dst. Element types are as for Mean.
func (db *DB) Sum(dst string, keys []string) error {
	return db.combine("adding up", dst, keys, false, func(to []float32, from [][]float32) error {
		kernel.SumVectors(to, from)
		return nil
	}, nil)
}

// Median stores the median of tensors of one shape, coordinate by coordinate,
// under dst; of an even number of tensors it is the mean of the middle two.
// Element types are as for Mean. See package robust.
func (db *DB) Median(dst string, keys []string) error {
	return db.combine("taking the median", dst, keys, true, robust.Median, nil)
}

// TrimmedMean stores the mean of what is left in each coordinate without the f
// smallest and the f largest values, under dst. There must be more than 2f
// tensors. Element types are as for Mean. See package robust.
func (db *DB) TrimmedMean(dst string, keys []string, f int) error {
	return db.combine("taking the trimmed mean", dst, keys, true, func(to []float32, from [][]float32) error { return robust.TrimmedMean(to, from, f) }, nil)
}

// maxSources bounds the tensors of one aggregate.
const maxSources = 1 << 16

// combine stores what f makes of tensors of one shape, all float32 or all
// float16, under dst as float32. Where ordered, a source with a NaN or an
// infinity is refused, else a result with one. halved, if not nil, takes the
// place of f where the tensors are float16.
func (db *DB) combine(doing, dst string, keys []string, ordered bool, f func(to []float32, from [][]float32) error, halved func(to []float32, from [][]uint16)) error {
	if err := checkKey(dst); err != nil {
		return err
	}
	if len(keys) == 0 || len(keys) > maxSources {
		return fmt.Errorf("%w: %s %d tensors, 1 to %d are allowed", ErrOutOfRange, doing, len(keys), maxSources)
	}
	var (
		dtype  tensor.DType
		bad    int // index of what is not finite, or -1
		badKey string
		failed error // of f
		parts  = make([][]float32, len(keys))
		whole  = make([][]float32, len(keys))
		halfs  = make([][]uint16, len(keys))
		space  [][]float32 // decoded halves
	)
	note := func(key string, part []float32, at int) {
		if bad >= 0 {
			return
		}
		if firstBad(&bad, part, at); bad >= 0 {
			badKey = key
		}
	}
	return db.space.Run(&Task{
		Reads: keys,
		Plan: func(reads []*Meta) (Plan, error) {
			bad, failed = -1, nil
			first, gradients := reads[0], true
			dtype = first.DType
			for i, m := range reads {
				switch {
				case m.DType != dtype || !slices.Equal(m.Shape, first.Shape):
					return Plan{}, fmt.Errorf("%s: %w: %q is %v %v, %q is %v %v", doing, ErrWrongType, keys[i], m.DType, m.Shape, keys[0], dtype, first.Shape)
				case dtype != tensor.Float32 && dtype != tensor.Float16:
					return Plan{}, fmt.Errorf("%s: %w: %q is %v, not float32 or float16", doing, ErrWrongType, keys[i], dtype)
				}
				gradients = gradients && m.Gradient
			}
			if dtype == tensor.Float16 && halved == nil && space == nil {
				for range keys {
					space = append(space, make([]float32, tileLen))
				}
			}
			out := Output{dst, Meta{DType: tensor.Float32, Shape: first.Shape, Gradient: gradients}}
			return Plan{Writes: []Output{out}, Span: first.Len(), Weight: 4 + dtype.Size()*len(keys)}, nil
		},
		Compute: func(d, src [][]byte, lo, hi int) {
			to := floats(d[0])
			for i, s := range src {
				if dtype == tensor.Float32 {
					whole[i] = floats(s)
				}
			}
			tiles(lo, hi, func(lo, hi int) {
				switch {
				case dtype == tensor.Float32:
					for i, w := range whole {
						parts[i] = w[lo:hi]
					}
				case halved != nil:
					for i, s := range src {
						halfs[i] = halves(s)[lo:hi]
					}
					halved(to[lo:hi], halfs)
					note(dst, to[lo:hi], lo)
					return
				default:
					for i, s := range src {
						parts[i] = space[i][:hi-lo]
						kernel.DecodeHalf(parts[i], halves(s)[lo:hi])
					}
				}
				if ordered {
					for i, p := range parts {
						note(keys[i], p, lo)
					}
				}
				if err := f(to[lo:hi], parts); err != nil {
					failed = err
				}
				if !ordered {
					note(dst, to[lo:hi], lo)
				}
			})
		},
		Check: func() error {
			switch {
			case failed != nil:
				return fmt.Errorf("%s: %w: %w", doing, ErrOutOfRange, failed)
			case bad < 0:
				return nil
			case ordered:
				return fmt.Errorf("%s: %w: %q at index %d", doing, ErrNotFinite, badKey, bad)
			}
			return fmt.Errorf("%s into %q: %w: the result of %q has no finite value at index %d", doing, dst, ErrNotFinite, keys, bad)
		},
	})
}

// checkWeights returns the weights as floats, nil where there are none.
func checkWeights(keys []string, weights []uint32) ([]float32, error) {
	if weights == nil {
		return nil, nil
	}
	if len(weights) != len(keys) {
		return nil, fmt.Errorf("%w: the mean of %d tensors with %d weights", ErrOutOfRange, len(keys), len(weights))
	}
	floats := make([]float32, len(weights))
	for i, w := range weights {
		if w < 1 || w > maxWeight {
			return nil, fmt.Errorf("%w: the weight %d of %q, 1 to %d are allowed", ErrOutOfRange, w, keys[i], maxWeight)
		}
		floats[i] = float32(w)
	}
	return floats, nil
}
