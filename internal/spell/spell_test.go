package spell

import (
	"slices"
	"strings"
	"testing"
)

func TestDistance(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"a", "", 1}, {"rounds", "roudns", 1}, {"peers", "pears", 1}, {"peers", "beer", 2}, {"lr", "model", 5}, {"ROUNDS", "rounds", 0}, {strings.Repeat("a", 100), strings.Repeat("a", 64), 0}} {
		if got := Distance(c.a, c.b); got != c.want || Distance(c.b, c.a) != c.want {
			t.Errorf("from %q to %q: %d, want %d", c.a, c.b, got, c.want)
		}
	}
}

func TestSort(t *testing.T) {
	words := []string{"cnn", "lenet5", "logistic", "mlp"}
	if Sort(words, "lenet"); words[0] != "lenet5" || !slices.Contains(words, "cnn") {
		t.Error(words)
	}
	same := []string{"b", "a"}
	if Sort(same, "c"); !slices.Equal(same, []string{"b", "a"}) {
		t.Error(same)
	}
}
