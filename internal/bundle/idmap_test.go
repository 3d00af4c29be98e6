package bundle

import (
	"math"
	"reflect"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func mapping(container, host, size uint32) specs.LinuxIDMapping {
	return specs.LinuxIDMapping{ContainerID: container, HostID: host, Size: size}
}

func TestReadMap(t *testing.T) {
	const all = math.MaxUint32
	for _, tt := range []struct {
		name string
		in   []specs.LinuxIDMapping
		want []IDRange
		err  []string
	}{
		{"none", nil, nil, nil},
		{"sorted", []specs.LinuxIDMapping{mapping(1, 100000, 10), mapping(0, 1000, 1)}, []IDRange{{0, 1000, 1}, {1, 100000, 10}}, nil},
		{"side by side", []specs.LinuxIDMapping{mapping(0, 10, 5), mapping(5, 5, 5)}, []IDRange{{0, 10, 5}, {5, 5, 5}}, nil},
		{"everything", []specs.LinuxIDMapping{mapping(0, 0, all)}, []IDRange{{0, 0, all}}, nil},
		{"last id", []specs.LinuxIDMapping{mapping(all-1, 0, 1)}, []IDRange{{all - 1, 0, 1}}, nil},
		{"nothing", []specs.LinuxIDMapping{mapping(0, 0, 0)}, nil, []string{"range of 0 ids"}},
		{"containerID -1", []specs.LinuxIDMapping{mapping(all, 0, 1)}, nil, []string{"4294967294"}},
		{"hostID too large", []specs.LinuxIDMapping{mapping(0, all-1, 2)}, nil, []string{"range of 2 ids", "4294967294"}},
		{"size too large", []specs.LinuxIDMapping{mapping(1, 0, all)}, nil, []string{"range of 4294967295"}},
		{"same containerID", []specs.LinuxIDMapping{mapping(5, 0, 5), mapping(0, 10, 6)}, nil, []string{"containerID 5"}},
		{"same hostID", []specs.LinuxIDMapping{mapping(0, 100, 10), mapping(50, 109, 1)}, nil, []string{"hostID 109"}},
		{"too many", make([]specs.LinuxIDMapping, maxRanges+1), nil, []string{"341", "340"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := readMap(tt.in)
			wantError(t, err, tt.err...)
			if !reflect.DeepEqual(got, tt.want) {
				t.Errorf("map %v, want %v", got, tt.want)
			}
		})
	}
}

// lookUp follows one id from the guest, or from a source, to the host side of a map; nil is the identity.
func lookUp(ranges []IDRange, id uint32) (uint32, bool) {
	if ranges == nil {
		return id, true
	}
	for _, r := range ranges {
		if id >= r.Guest && id-r.Guest < r.Count {
			return id - r.Guest + r.Host, true
		}
	}
	return 0, false
}

// TestCompose compares with what becomes of each id on its own.
func TestCompose(t *testing.T) {
	for _, tt := range []struct {
		name             string
		container, mount []IDRange
		want             []IDRange
	}{
		{"equal", []IDRange{{0, 100, 50}}, []IDRange{{0, 100, 50}}, []IDRange{{0, 0, 50}}},
		{"equal, of several ranges", []IDRange{{0, 1000, 1}, {1, 100, 49}}, []IDRange{{0, 1000, 1}, {1, 100, 49}}, []IDRange{{0, 0, 50}}},
		{"no container's", nil, []IDRange{{0, 100, 10}}, []IDRange{{100, 0, 10}}},
		{"no container's, everything", nil, []IDRange{{0, 0, math.MaxUint32}}, []IDRange{{0, 0, math.MaxUint32}}},
		{"shifted", []IDRange{{0, 100, 50}}, []IDRange{{20, 110, 10}}, []IDRange{{10, 20, 10}}},
		{"overlap at both ends", []IDRange{{0, 100, 10}, {10, 200, 10}}, []IDRange{{0, 105, 100}}, []IDRange{{5, 0, 5}, {10, 95, 5}}},
		{"crossed", []IDRange{{0, 20, 10}, {10, 10, 10}}, []IDRange{{0, 10, 10}, {10, 20, 10}}, []IDRange{{0, 10, 10}, {10, 0, 10}}},
		{"nothing in common", []IDRange{{0, 100, 10}}, []IDRange{{0, 200, 10}}, nil},
		{"end to end", []IDRange{{0, 100, 10}}, []IDRange{{0, 110, 10}}, nil},
		{"host's order is not the source's", []IDRange{{0, 0, 100}}, []IDRange{{0, 50, 10}, {10, 0, 10}}, []IDRange{{0, 10, 10}, {50, 0, 10}}},
		{"at the end", []IDRange{{0, math.MaxUint32 - 10, 10}}, []IDRange{{5, math.MaxUint32 - 5, 5}}, []IDRange{{5, 5, 5}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := compose(tt.container, tt.mount)
			if !reflect.DeepEqual(got, tt.want) {
				t.Errorf("composed %v, want %v", got, tt.want)
			}
			if got == nil {
				return
			}
			for guest := range uint32(300) {
				source, ok := lookUp(got, guest)
				host, inContainer := lookUp(tt.container, guest)
				if !ok {
					continue
				}
				if back, inMount := lookUp(tt.mount, source); !inContainer || !inMount || back != host {
					t.Errorf("guest's %d is the source's %d, which is %d on the host, while the guest's is %d", guest, source, back, host)
				}
			}
		})
	}
}

func TestMaps(t *testing.T) {
	host := makeHost(t)
	container := []specs.LinuxIDMapping{mapping(0, 100000, 65536)}
	idmapped := func(uid, gid []specs.LinuxIDMapping, options ...string) specs.Mount {
		m := bind("/new", "spare", options...)
		m.UIDMappings, m.GIDMappings = uid, gid
		return m
	}
	volume := []specs.LinuxIDMapping{mapping(1000, 100000, 1)}
	onTmpfs := tmpfs("/new")
	onTmpfs.UIDMappings, onTmpfs.GIDMappings = volume, volume
	onOther := specs.Mount{Destination: "/new", Type: "overlay", UIDMappings: volume, GIDMappings: volume}
	containers := []IDRange{{0, 100000, 65536}}
	identity := []IDRange{{0, 0, 65536}}
	for _, tt := range []struct {
		name     string
		uid, gid []specs.LinuxIDMapping // of the container
		mount    specs.Mount
		want     []IDRange // of the mount
		err      []string
	}{
		{"none", nil, nil, idmapped(nil, nil), nil, nil},
		{"container's", container, container, idmapped(nil, nil), containers, nil},
		{"mount's", container, container, idmapped(volume, volume, "idmap"), []IDRange{{0, 1000, 1}}, nil},
		{"mount's without the option", container, container, idmapped(volume, volume), []IDRange{{0, 1000, 1}}, nil},
		{"mount's alone", nil, nil, idmapped(volume, volume, "ridmap"), []IDRange{{100000, 1000, 1}}, nil},
		{"equal", container, container, idmapped(container, container, "idmap"), identity, nil},
		{"container's by the option", container, container, idmapped(nil, nil, "ridmap"), identity, nil},
		{"other", container, container, onOther, []IDRange{{0, 1000, 1}}, nil},
		{"tmpfs in a mapped container", container, container, tmpfs("/new"), nil, nil},
		{"no map for the option", nil, nil, idmapped(nil, nil, "idmap"), nil, []string{"mounts[0]", `"/new"`, "idmap"}},
		{"nothing in common", container, container, idmapped([]specs.LinuxIDMapping{mapping(0, 5, 1)}, volume), nil, []string{"uidMappings", "no id"}},
		{"nothing in common of groups", container, container, idmapped(volume, []specs.LinuxIDMapping{mapping(0, 5, 1)}), nil, []string{"gidMappings", "no id"}},
		{"only users", nil, nil, idmapped(volume, nil), nil, []string{"uidMappings and gidMappings", "both"}},
		{"only groups", nil, nil, idmapped(nil, volume), nil, []string{"both"}},
		{"only the container's users", container, nil, idmapped(nil, nil), nil, []string{"linux:", "both"}},
		{"bad users", nil, nil, idmapped([]specs.LinuxIDMapping{mapping(0, 0, 0)}, volume), nil, []string{"uidMappings: range of 0"}},
		{"bad groups", nil, nil, idmapped(volume, []specs.LinuxIDMapping{mapping(0, 0, 0)}), nil, []string{"gidMappings: range of 0"}},
		{"tmpfs", nil, nil, onTmpfs, nil, []string{"tmpfs has no ids"}},
		{"tmpfs by the option", container, container, tmpfs("/new", "idmap"), nil, []string{"tmpfs has no ids"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := bundleOf(host, tt.mount)
			b.Spec.Linux = &specs.Linux{UIDMappings: tt.uid, GIDMappings: tt.gid}
			plan, err := b.Plan()
			wantError(t, err, tt.err...)
			if err != nil {
				return
			}
			m := plan.Mounts[0]
			if !reflect.DeepEqual(m.UIDMap, tt.want) || !reflect.DeepEqual(m.GIDMap, tt.want) {
				t.Errorf("maps %v and %v, want %v", m.UIDMap, m.GIDMap, tt.want)
			}
			if tt.uid != nil && !reflect.DeepEqual(plan.Root.UIDMap, containers) {
				t.Errorf("the root's map is %v, want %v", plan.Root.UIDMap, containers)
			}
		})
	}
}

func TestUserNamespaceWithoutMappings(t *testing.T) {
	b := bundleOf(makeHost(t))
	b.Spec.Linux = &specs.Linux{Namespaces: []specs.LinuxNamespace{{Type: specs.UserNamespace, Path: "/proc/1/ns/user"}}}
	plan, err := b.Plan()
	if err != nil {
		t.Fatal(err)
	}
	wantNotes(t, plan, "user namespace without mappings")
}
