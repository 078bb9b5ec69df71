package events

// MaxPoints bounds the points of a Series.
const MaxPoints = 4096

// maxValue bounds what is taken into sums, so that these are numbers that JSON
// has.
const maxValue = 1e100

// Series is a curve over rounds: the mean of what was added for each round, or
// for each few rounds once there are more than MaxPoints. Rounds may come in
// any order.
type Series struct {
	stride uint64 // rounds a point
	sums   []float64
	counts []uint32
}

// Add adds a value for a round from 1 on.
func (s *Series) Add(round uint64, value float64) {
	if round == 0 || round > 1<<53 || !(value > -maxValue && value < maxValue) {
		return
	}
	s.stride = max(s.stride, 1)
	for (round-1)/s.stride >= MaxPoints {
		s.halve()
	}
	i := int((round - 1) / s.stride)
	for len(s.sums) <= i {
		s.sums, s.counts = append(s.sums, 0), append(s.counts, 0)
	}
	s.sums[i] += value
	s.counts[i]++
}

// change changes one value that was added for a round.
func (s *Series) change(round uint64, by float64) {
	if round == 0 || s.stride == 0 {
		return
	}
	if i := (round - 1) / s.stride; i < uint64(len(s.sums)) && s.counts[i] > 0 {
		s.sums[i] += by
	}
}

// halve makes one point of two.
func (s *Series) halve() {
	n := (len(s.sums) + 1) / 2
	for i := range n {
		sum, count := s.sums[2*i], s.counts[2*i]
		if 2*i+1 < len(s.sums) {
			sum, count = sum+s.sums[2*i+1], count+s.counts[2*i+1]
		}
		s.sums[i], s.counts[i] = sum, count
	}
	s.sums, s.counts, s.stride = s.sums[:n], s.counts[:n], 2*s.stride
}

// Stride returns how many rounds a point stands for.
func (s *Series) Stride() uint64 { return max(s.stride, 1) }

// Points returns the curve: rounds, ascending, and the mean at each.
func (s *Series) Points() (rounds []uint64, values []float64) { return s.After(0) }

// After returns the points that may have changed since the curve ended with
// that round.
func (s *Series) After(round uint64) (rounds []uint64, values []float64) {
	rounds, values = []uint64{}, []float64{}
	for i, n := range s.counts {
		if at := uint64(i)*s.stride + s.stride; n > 0 && at >= round {
			rounds, values = append(rounds, at), append(values, s.sums[i]/float64(n))
		}
	}
	return rounds, values
}

// Last returns the last point, ok false if there is none.
func (s *Series) Last() (round uint64, value float64, ok bool) {
	for i := len(s.counts) - 1; i >= 0; i-- {
		if s.counts[i] > 0 {
			return uint64(i)*s.stride + s.stride, s.sums[i] / float64(s.counts[i]), true
		}
	}
	return 0, 0, false
}
