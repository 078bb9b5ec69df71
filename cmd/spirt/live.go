package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/term"

	"github.com/spirt-ml/spirt/events"
)

// redrawEvery is the time between two pictures.
const redrawEvery = 200 * time.Millisecond

// live draws a run over and over at one place of a terminal, above whatever is
// written after it. The last picture stays.
//
// The terminal is left as it is but for the echo of keys, so Ctrl-C and Ctrl-Z
// mean what they always do.
type live struct {
	screen screen
	tty    *terminal
	size   func() (width, height int)

	mu    sync.Mutex
	frame frame
	view  *events.View

	stop, done chan struct{}
}

// screen keeps what stands on the terminal, so that it can be drawn over.
type screen struct {
	w     io.Writer
	drawn []int // columns that each line of the last picture took
}

// draw replaces the last picture. Lines that were wrapped when the terminal
// became narrower take more than one of it.
func (s *screen) draw(picture string, width int) error {
	up := 0
	for _, n := range s.drawn {
		up += max(1, (n+width-1)/width)
	}
	var b strings.Builder
	b.WriteString("\x1b[?2026h\x1b[?25l\r") // shown at once, without a cursor
	if up > 0 {
		fmt.Fprintf(&b, "\x1b[%dA", up)
	}
	s.drawn = s.drawn[:0]
	for line := range strings.Lines(picture) {
		line = strings.TrimSuffix(line, "\n")
		s.drawn = append(s.drawn, columns(withoutStyle(line)))
		b.WriteString(line)
		b.WriteString("\x1b[K\r\n") // nothing of the line before is left
	}
	b.WriteString("\x1b[J\x1b[?25h\x1b[?2026l")
	_, err := io.WriteString(s.w, b.String())
	return err
}

// forget has the next picture drawn below whatever stands there.
func (s *screen) forget() { s.drawn = s.drawn[:0] }

// withoutStyle returns a line without the sequences that row.add wrote.
func withoutStyle(line string) string {
	var b strings.Builder
	for {
		before, after, found := strings.Cut(line, "\x1b[")
		b.WriteString(before)
		if !found {
			return b.String()
		}
		_, line, _ = strings.Cut(after, "m")
	}
}

// newLive starts to draw a view if w is a terminal that can be drawn on, and
// returns nil otherwise. Only update may change the view.
func newLive(w io.Writer, view *events.View, f frame) *live {
	if !isTerminal(w) || os.Getenv("TERM") == "dumb" {
		return nil
	}
	file := w.(*os.File)
	tty := openTerminal(file)
	if tty == nil || !tty.foreground() {
		return nil
	}
	f.colour = os.Getenv("NO_COLOR") == ""
	l := &live{screen: screen{w: file}, tty: tty, view: view, frame: f, stop: make(chan struct{}), done: make(chan struct{})}
	l.size = func() (int, int) {
		width, height, err := term.GetSize(int(file.Fd()))
		if err != nil || width < 1 || height < 1 {
			return 80, 24
		}
		return width, height
	}
	tty.quiet()
	go l.run()
	return l
}

// update calls change, which alone may change the view.
func (l *live) update(change func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	change()
}

// say has the picture carry a note.
func (l *live) say(note string) { l.update(func() { l.frame.note = note }) }

func (l *live) run() {
	defer close(l.done)
	tick := time.NewTicker(redrawEvery)
	defer tick.Stop()
	hidden := false
	for {
		if !l.tty.foreground() { // the shell has the terminal
			hidden = true
		} else {
			if hidden {
				hidden = false
				l.tty.quiet()
				l.screen.forget()
			}
			l.draw()
		}
		select {
		case <-tick.C:
		case <-l.tty.continued:
			hidden = true // stopped and continued between two pictures
		case <-l.stop:
			if l.tty.foreground() {
				l.draw()
			}
			return
		}
	}
}

func (l *live) draw() {
	l.mu.Lock()
	l.frame.width, l.frame.height = l.size()
	picture, width := l.frame.render(l.view, time.Now()), l.frame.width
	l.mu.Unlock()
	_ = l.screen.draw(picture, width) // a terminal that is gone is no reason to end the run
}

// loud gives the terminal its echo back, while pictures go on: the next signal
// may end this process at once.
func (l *live) loud() { l.tty.restore() }

// close draws the last picture and gives the terminal back.
func (l *live) close() {
	close(l.stop)
	<-l.done
	l.tty.close()
}

// isTerminal reports whether what is written to w is seen by a person at once.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}
