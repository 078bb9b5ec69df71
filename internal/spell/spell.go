// Package spell compares what was written with what may have been meant. Call
// Distance; Sort orders words by it. Text may come from outside: its length is
// bounded here.
package spell

import (
	"slices"
	"strings"
)

// maxText bounds what is looked at of a text in bytes.
const maxText = 64

// Distance is how many letters must be put in, left out, changed or swapped
// with their neighbour to turn a into b (optimal string alignment), whatever
// their case. Only the first 64 bytes of each count.
func Distance(a, b string) int {
	a, b = strings.ToLower(a[:min(len(a), maxText)]), strings.ToLower(b[:min(len(b), maxText)])
	before, last, now := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range last {
		last[j] = j
	}
	for i := range len(a) {
		now[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			now[j+1] = min(last[j]+cost, last[j+1]+1, now[j]+1)
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				now[j+1] = min(now[j+1], before[j-1]+1)
			}
		}
		before, last, now = last, now, before
	}
	return last[len(b)]
}

// Sort orders words by their distance from text, the nearest first; those of
// one distance stay as they are.
func Sort(words []string, text string) {
	slices.SortStableFunc(words, func(a, b string) int { return Distance(text, a) - Distance(text, b) })
}
