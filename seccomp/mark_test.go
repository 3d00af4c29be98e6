package seccomp

import (
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// entered returns the owners of all marks, in order.
func (m *Marks) entered() []Owner {
	var owners []Owner
	for i := range m.slots {
		for j := range m.slots[i] {
			if mark := m.slots[i][j].Load(); mark != 0 {
				owners = append(owners, Owner(uint32(mark)))
			}
		}
	}
	slices.Sort(owners)
	return owners
}

func TestRegister(t *testing.T) {
	m := new(Marks)
	for i, tt := range []struct{ name, want string }{
		{"http", "http"},
		{"ein name=\"\\\x00\xff", "ein_name_____"},
		{strings.Repeat("x", 64), strings.Repeat("x", 63)},
	} {
		for range 2 { // the second time finds the first
			o, err := m.Register(tt.name)
			if err != nil || o != Owner(i+1) || m.name(o) != tt.want {
				t.Errorf("Register(%q) = %d, %v, called %q; want %d, called %q", tt.name, o, err, m.name(o), i+1, tt.want)
			}
		}
	}
	for i := 3; i < maxOwners-1; i++ {
		if _, err := m.Register(strconv.Itoa(i)); err != nil {
			t.Fatal(err)
		}
	}
	if o, err := m.Register("one too many"); err == nil {
		t.Errorf("owner %d of %d", o, maxOwners)
	}
	if o, err := m.Register("http"); err != nil || o != 1 {
		t.Errorf("Register of a known name = %d, %v when there is no room for others", o, err)
	}
}

func TestMarks(t *testing.T) {
	m := new(Marks)
	m.Enter(1)
	if got := m.entered(); got != nil {
		t.Errorf("marks %v without a filter", got)
	}
	m.active.Store(true)
	var entered, done sync.WaitGroup
	leave := make(chan struct{})
	var want []Owner
	for i := range 100 {
		o := Owner(i%3 + 1)
		want = append(want, o)
		entered.Add(1)
		done.Go(func() {
			runtime.LockOSThread()
			m.Enter(7)
			m.Enter(o) // replaces it
			entered.Done()
			<-leave
			m.Leave()
		})
	}
	slices.Sort(want)
	entered.Wait()
	if got := m.entered(); !slices.Equal(got, want) {
		t.Errorf("marks of %v, want %v", got, want)
	}
	close(leave)
	done.Wait()
	if got := m.entered(); got != nil {
		t.Errorf("marks of %v when all have left", got)
	}
}

// TestMarksFull has other threads take all the slots of this one's bucket.
func TestMarksFull(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	m := new(Marks)
	m.active.Store(true)
	bucket := &m.slots[unix.Gettid()%markBuckets]
	for i := range bucket {
		bucket[i].Store(uint64(unix.Gettid()+(i+1)*markBuckets)<<32 | 1)
	}
	m.Enter(2)
	m.Leave()
	if got := m.entered(); !slices.Equal(got, []Owner{1, 1, 1, 1, 1, 1, 1, 1}) {
		t.Errorf("marks of %v, want the others' as they were", got)
	}
}

func TestMarksAllocate(t *testing.T) {
	m := new(Marks)
	m.active.Store(true)
	if n := testing.AllocsPerRun(100, func() {
		m.Enter(1)
		m.Leave()
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkMarks(b *testing.B) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	m := new(Marks)
	m.active.Store(true)
	for b.Loop() {
		m.Enter(1)
		m.Leave()
	}
}
