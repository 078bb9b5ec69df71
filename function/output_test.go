package function

import (
	"bytes"
	"strings"
	"testing"
)

// What one attempt prints is logged up to a bound, and the next one's again.
func TestLoggedOutputIsBounded(t *testing.T) {
	var lines []string
	o, err := newOutput(func(line string) { lines = append(lines, line) })
	if err != nil {
		t.Fatal(err)
	}
	add := func(b []byte) {
		o.mu.Lock()
		defer o.mu.Unlock()
		o.addLocked(b)
	}
	line := append(bytes.Repeat([]byte("x"), 1023), '\n')
	for range 10 * maxLogged / len(line) {
		add(line)
	}
	logged := len(strings.Join(lines, ""))
	if logged > maxLogged+longLine || logged < maxLogged/2 || !strings.Contains(lines[len(lines)-1], "not logged") {
		t.Errorf("%d bytes logged, the last line is %q", logged, lines[len(lines)-1])
	}
	if len(o.kept) != keptOutput {
		t.Errorf("%d bytes are kept of the end, want %d", len(o.kept), keptOutput)
	}
	o.mark()
	add([]byte("the next attempt\n"))
	if got := lines[len(lines)-1]; got != "the next attempt" {
		t.Errorf("the last line is %q", got)
	}
	o.started()
	o.close()
}
