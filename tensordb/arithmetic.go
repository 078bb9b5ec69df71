package tensordb

import (
	"fmt"
	"math"
	"slices"

	"github.com/spirt-ml/spirt/internal/kernel"
	"github.com/spirt-ml/spirt/tensor"
)

// vectors returns an error unless all are float32 and of one length.
func vectors(doing string, keys []string, metas []*Meta) error {
	for i, m := range metas {
		if m.DType != tensor.Float32 {
			return fmt.Errorf("%s: %w: %q is %v, not float32", doing, ErrWrongType, keys[i], m.DType)
		}
		if m.Len() != metas[0].Len() {
			return fmt.Errorf("%s: %w: %q is %v, %q is %v", doing, ErrWrongType, keys[i], m.Shape, keys[0], metas[0].Shape)
		}
	}
	return nil
}

// elementwise stores what f makes of float32 tensors of one length under dst,
// with the shape of the first.
func (db *DB) elementwise(doing, dst string, keys []string, f func(to []float32, from [][]float32)) error {
	if err := checkKey(dst); err != nil {
		return err
	}
	bad := -1
	parts := make([][]float32, len(keys))
	return db.space.Run(&Task{
		Reads: keys,
		Plan: func(reads []*Meta) (Plan, error) {
			bad = -1
			if err := vectors(doing, keys, reads); err != nil {
				return Plan{}, err
			}
			gradient := !slices.ContainsFunc(reads, func(m *Meta) bool { return !m.Gradient })
			return Plan{Writes: []Output{{dst, Meta{DType: tensor.Float32, Shape: reads[0].Shape, Gradient: gradient}}}, Span: reads[0].Len(), Weight: 4 * (1 + len(keys))}, nil
		},
		Compute: func(d, src [][]byte, lo, hi int) {
			to := floats(d[0])
			tiles(lo, hi, func(lo, hi int) {
				for i, s := range src {
					parts[i] = floats(s)[lo:hi]
				}
				f(to[lo:hi], parts)
				firstBad(&bad, to[lo:hi], lo)
			})
		},
		Check: func() error {
			if bad >= 0 {
				return fmt.Errorf("%s: %w: the result %q would not be at index %d", doing, ErrNotFinite, dst, bad)
			}
			return nil
		},
	})
}

// Scale stores alpha times the float32 tensor src under dst.
func (db *DB) Scale(dst string, alpha float32, src string) error {
	return db.elementwise("scaling", dst, []string{src}, func(to []float32, from [][]float32) {
		copy(to, from[0])
		kernel.Scale(to, alpha)
	})
}

// Axpy stores alpha*x + y, product and sum rounded apart, under dst.
func (db *DB) Axpy(dst string, alpha float32, x, y string) error {
	return db.elementwise("adding", dst, []string{y, x}, func(to []float32, from [][]float32) {
		copy(to, from[0])
		kernel.AddScaled(to, alpha, from[1])
	})
}

// reduce adds up in float64 what f finds in float32 tensors of one length.
// Sums are taken in a fixed order, so the result is the same on every CPU.
func (db *DB) reduce(doing string, keys []string, sums int, f func(totals []float64, parts [][]float32)) ([]float64, error) {
	totals := make([]float64, sums)
	parts := make([][]float32, len(keys))
	err := db.space.Run(&Task{
		Reads: keys,
		Plan: func(reads []*Meta) (Plan, error) {
			clear(totals)
			if err := vectors(doing, keys, reads); err != nil {
				return Plan{}, err
			}
			return Plan{Span: reads[0].Len(), Weight: 4 * len(keys)}, nil
		},
		Compute: func(_, src [][]byte, lo, hi int) {
			tiles(lo, hi, func(lo, hi int) {
				for i, s := range src {
					parts[i] = floats(s)[lo:hi]
				}
				f(totals, parts)
			})
		},
	})
	if err != nil {
		return nil, err
	}
	for _, t := range totals {
		if math.IsNaN(t) || math.IsInf(t, 0) {
			return nil, fmt.Errorf("%s: %w: %q", doing, ErrNotFinite, keys)
		}
	}
	return totals, nil
}

// Norm returns the Euclidean norm of a float32 tensor.
func (db *DB) Norm(key string) (float64, error) {
	t, err := db.reduce("taking the norm", []string{key}, 1, func(totals []float64, parts [][]float32) {
		totals[0] = kernel.SumSquaresBlocks(totals[0], parts[0])
	})
	if err != nil {
		return 0, err
	}
	return math.Sqrt(t[0]), nil
}

// Dot returns the inner product of two float32 tensors of one length.
func (db *DB) Dot(a, b string) (float64, error) {
	t, err := db.reduce("taking the dot product", []string{a, b}, 1, func(totals []float64, parts [][]float32) {
		totals[0] = kernel.DotBlocks(totals[0], parts[0], parts[1])
	})
	if err != nil {
		return 0, err
	}
	return t[0], nil
}

// Cosine returns the cosine of the angle between two float32 tensors of one
// length, 0 where one of them has no length.
func (db *DB) Cosine(a, b string) (float64, error) {
	t, err := db.reduce("taking the cosine", []string{a, b}, 3, func(totals []float64, parts [][]float32) {
		totals[0] = kernel.DotBlocks(totals[0], parts[0], parts[1])
		totals[1] = kernel.SumSquaresBlocks(totals[1], parts[0])
		totals[2] = kernel.SumSquaresBlocks(totals[2], parts[1])
	})
	if err != nil {
		return 0, err
	}
	if t[1] == 0 || t[2] == 0 {
		return 0, nil
	}
	return min(max(t[0]/(math.Sqrt(t[1])*math.Sqrt(t[2])), -1), 1), nil
}

// Clip stores src under dst, scaled down so that its Euclidean norm is at most
// limit, and returns the norm that src has.
func (db *DB) Clip(dst, src string, limit float32) (float64, error) {
	if !(limit > 0) || math.IsInf(float64(limit), 0) {
		return 0, fmt.Errorf("%w: clipping to the norm %v, which is not a positive number", ErrOutOfRange, limit)
	}
	norm, err := db.Norm(src)
	if err != nil {
		return 0, err
	}
	if norm <= float64(limit) {
		if dst == src {
			return norm, nil
		}
		return norm, db.Copy(dst, src)
	}
	return norm, db.Scale(dst, float32(float64(limit)/norm), src)
}

// Cast stores src under dst with another element type. See tensor.Convert for
// how numbers are rounded.
func (db *DB) Cast(dst, src string, dtype tensor.DType) error {
	if err := checkKey(dst); err != nil {
		return err
	}
	if !dtype.Valid() {
		return fmt.Errorf("%w: unknown element type %v", ErrWrongType, dtype)
	}
	var from Meta
	return db.space.Run(&Task{
		Reads: []string{src},
		Plan: func(reads []*Meta) (Plan, error) {
			from = *reads[0]
			return Plan{Writes: []Output{{dst, Meta{DType: dtype, Shape: from.Shape, Gradient: from.Gradient}}}, Span: from.Len(), Weight: from.DType.Size() + dtype.Size()}, nil
		},
		Compute: func(d, s [][]byte, lo, hi int) {
			tensor.Convert(tensor.Tensor{DType: dtype, Shape: from.Shape, Data: d[0]}, tensor.Tensor{DType: from.DType, Shape: from.Shape, Data: s[0]}, lo, hi)
		},
	})
}

// maxHalf is the largest half; what is nearer to it than to the next step
// becomes it.
const maxHalf = 65504

// Half stores the float32 tensor src under dst as float16, each number rounded
// to the nearest, ties to even. One beyond 65504 is ErrOutOfRange, and then
// nothing is stored.
func (db *DB) Half(dst, src string) error {
	if err := checkKey(dst); err != nil {
		return err
	}
	bad, value := -1, float32(0)
	return db.space.Run(&Task{
		Reads: []string{src},
		Plan: func(reads []*Meta) (Plan, error) {
			bad = -1
			if reads[0].DType != tensor.Float32 {
				return Plan{}, fmt.Errorf("%w: %q is %v, not float32", ErrWrongType, src, reads[0].DType)
			}
			return Plan{Writes: []Output{{dst, Meta{DType: tensor.Float16, Shape: reads[0].Shape, Gradient: reads[0].Gradient}}}, Span: reads[0].Len(), Weight: 6}, nil
		},
		Compute: func(d, s [][]byte, lo, hi int) {
			to, from := halves(d[0]), floats(s[0])
			tiles(lo, hi, func(lo, hi int) {
				kernel.EncodeHalf(to[lo:hi], from[lo:hi])
				if i := tensor.NonFiniteHalf(to[lo:hi]); i >= 0 && bad < 0 {
					bad, value = lo+i, from[lo+i]
				}
			})
		},
		Check: func() error {
			if bad >= 0 {
				return fmt.Errorf("%w: %q has %v at index %d, float16 ends at %d", ErrOutOfRange, src, value, bad, maxHalf)
			}
			return nil
		},
	})
}

// Slice stores rows start to stop-1 of src, along its first dimension, under
// dst.
func (db *DB) Slice(dst, src string, start, stop int) error {
	if err := checkKey(dst); err != nil {
		return err
	}
	size := 0
	return db.space.Run(&Task{
		Reads: []string{src},
		Plan: func(reads []*Meta) (Plan, error) {
			m := reads[0]
			if len(m.Shape) == 0 {
				return Plan{}, fmt.Errorf("%w: %q is a single number and has no rows", ErrWrongType, src)
			}
			if start < 0 || stop < start || stop > m.Shape[0] {
				return Plan{}, fmt.Errorf("%w: rows %d to %d of %q, which has %d rows", ErrOutOfRange, start, stop, src, m.Shape[0])
			}
			shape := slices.Clone(m.Shape)
			shape[0] = stop - start
			out := Output{dst, Meta{DType: m.DType, Shape: shape, Gradient: m.Gradient}}
			bytes := out.Meta.Len() * m.DType.Size()
			size = 0
			if stop > start {
				size = bytes / (stop - start)
			}
			return Plan{Writes: []Output{out}, Span: bytes, Weight: 2}, nil
		},
		Compute: func(d, s [][]byte, lo, hi int) { copy(d[0][lo:hi], s[0][start*size+lo:start*size+hi]) },
	})
}

// QuantRow is the bytes of one row of a quantised tensor: the scale, a
// little-endian float32, and then kernel.QuantBlock numbers of int8.
const QuantRow = 4 + kernel.QuantBlock

// Quantise stores the float32 tensor src under dst in blocks of int8: an int8
// tensor of shape [blocks, QuantRow], the last block filled with zeros.
func (db *DB) Quantise(dst, src string) error {
	if err := checkKey(dst); err != nil {
		return err
	}
	bad, n := -1, 0
	return db.space.Run(&Task{
		Reads: []string{src},
		Plan: func(reads []*Meta) (Plan, error) {
			bad = -1
			if reads[0].DType != tensor.Float32 {
				return Plan{}, fmt.Errorf("%w: %q is %v, not float32", ErrWrongType, src, reads[0].DType)
			}
			n = reads[0].Len()
			blocks := (n + kernel.QuantBlock - 1) / kernel.QuantBlock
			return Plan{Writes: []Output{{dst, Meta{DType: tensor.Int8, Shape: []int{blocks, QuantRow}, Gradient: reads[0].Gradient}}}, Span: blocks, Weight: 5 * kernel.QuantBlock}, nil
		},
		Compute: func(d, s [][]byte, lo, hi int) {
			from := floats(s[0])
			for b := lo; b < hi; b++ {
				row := d[0][b*QuantRow : (b+1)*QuantRow]
				part := from[b*kernel.QuantBlock : min((b+1)*kernel.QuantBlock, n)]
				firstBad(&bad, part, b*kernel.QuantBlock)
				q := int8s(row[4:])
				clear(q[len(part):])
				kernel.QuantiseInt8(q[:len(part)], floats(row[:4]), part)
			}
		},
		Check: func() error {
			if bad >= 0 {
				return fmt.Errorf("quantising: %w: %q at index %d", ErrNotFinite, src, bad)
			}
			return nil
		},
	})
}

// Dequantise stores what Quantise made of a tensor under dst as float32 with
// the shape that it had.
func (db *DB) Dequantise(dst, src string, shape []int) error {
	if err := checkKey(dst); err != nil {
		return err
	}
	if _, err := tensor.DataLen(tensor.Float32, shape); err != nil {
		return fmt.Errorf("dequantising: %w: %w", ErrWrongType, err)
	}
	out := Meta{DType: tensor.Float32, Shape: slices.Clone(shape)}
	n, bad := out.Len(), -1
	return db.space.Run(&Task{
		Reads: []string{src},
		Plan: func(reads []*Meta) (Plan, error) {
			bad = -1
			m := reads[0]
			blocks := (n + kernel.QuantBlock - 1) / kernel.QuantBlock
			if m.DType != tensor.Int8 || !slices.Equal(m.Shape, []int{blocks, QuantRow}) {
				return Plan{}, fmt.Errorf("dequantising: %w: %q is %v %v, %v quantised is int8 %v", ErrWrongType, src, m.DType, m.Shape, shape, []int{blocks, QuantRow})
			}
			out.Gradient = m.Gradient
			return Plan{Writes: []Output{{dst, out}}, Span: blocks, Weight: 5 * kernel.QuantBlock}, nil
		},
		Compute: func(d, s [][]byte, lo, hi int) {
			to := floats(d[0])
			for b := lo; b < hi; b++ {
				row := s[0][b*QuantRow : (b+1)*QuantRow]
				part := to[b*kernel.QuantBlock : min((b+1)*kernel.QuantBlock, n)]
				kernel.DequantiseInt8(part, int8s(row[4:])[:len(part)], floats(row[:4]))
				firstBad(&bad, part, b*kernel.QuantBlock)
			}
		},
		Check: func() error {
			if bad >= 0 {
				return fmt.Errorf("dequantising: %w: %q at index %d", ErrNotFinite, src, bad)
			}
			return nil
		},
	})
}
